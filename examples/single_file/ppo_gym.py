"""PPO for a Gymnasium environment, on one page. Read it from top to bottom.

A policy acts in several sub-environments at once, and a critic, trained along, predicts the rewards to come. One update of
PPO (Schulman et al. 2017, arXiv:1707.06347) is three steps, each of them a function below, and `train` repeats them:

    1. collect     act for `n_steps` in every sub-environment; note observations, actions, log-probs, values and rewards;
    2. advantages  how much better than expected was each action? Expected is what the critic said;
    3. update      gradient steps make good actions more probable, but none by more than a trusted range.

Left out is what should change no number (gradients written out by hand, one vector for all weights, worker processes), and
images, recurrent networks, action masks, normalization and checkpoints. In float32 on a CPU, the `surefoot` package gives the
same losses and the same weights as this page, to rounding; `tests/oracle` holds both to it.

    python ppo_gym.py                                        # CartPole in half a minute: the pole stays up for 500 steps
    python ppo_gym.py --env Pendulum-v1 --timesteps 200000 --gamma 0.9 --learning-rate 1e-3 --batch-size 64 --n-epochs 10
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import gymnasium
import numpy
import torch
from torch import Tensor, nn


def setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """Every number of the algorithm, named as in the package."""

    seed: int = setting(0, "all randomness follows from it")
    total_timesteps: int = setting(80_000, "steps in the whole run, all sub-environments together; rounded up to whole updates")
    n_envs: int = setting(8, "sub-environments that are stepped together")
    n_steps: int = setting(128, "steps of each sub-environment in one update")
    batch_size: int = setting(256, "steps in a minibatch, which is one optimizer step")
    n_epochs: int = setting(10, "passes over the steps of an update")
    learning_rate: float = setting(1e-3, "Adam's step size")
    lr_schedule: str = setting("linear", "constant, or linear: falling to 0 over the run")
    adam_epsilon: float = setting(1e-5, "Adam's epsilon")
    max_grad_norm: float = setting(0.5, "the gradient is shortened to this length")
    clip_range: float = setting(0.2, "how far an action's probability ratio is trusted")
    clip_range_vf: float | None = setting(None, "the same for the critic's values; none by default")
    gamma: float = setting(0.99, "discount per step")
    gae_lambda: float = setting(0.95, "how far advantages look ahead: 0 trusts the critic, 1 the rewards")
    normalize_advantage: bool = setting(True, "give each minibatch's advantages mean 0 and variance 1")
    vf_coef: float = setting(0.5, "weight of the critic's loss")
    ent_coef: float = setting(0.0, "weight of the entropy bonus")
    target_kl: float | None = setting(None, "end an update once a minibatch is this far from the old policy, nats")


@dataclass
class Batch:
    """What happened in one rollout. T steps, N sub-environments, D numbers in an observation."""

    observations: Tensor  # [T, N, D]
    actions: Tensor  # [T, N] int64, or [T, N, A] float32
    logprobs: Tensor  # [T, N], nats, under the policy that acted
    values: Tensor  # [T, N], the critic's, of the observations
    rewards: Tensor  # [T, N]
    next_values: Tensor  # [T, N], of the observations after the actions; 0 where the episode terminated there
    ended: Tensor  # [T, N] bool: terminated, or truncated by a time limit
    advantages: Tensor | None = None
    returns: Tensor | None = None


def derived(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose: which update or episode it serves decides its random numbers, nothing before it."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") // 2


class Envs:
    """`n_envs` of one environment, stepped together. Each episode has its own seed: seed and actions repeat it."""

    def __init__(self, make: Callable[[], Any], s: Settings):
        # We reset them ourselves, so that the last observation of an episode is not overwritten by the first of the next.
        mode = gymnasium.vector.AutoresetMode.DISABLED
        self.vector = gymnasium.vector.SyncVectorEnv([make] * s.n_envs, autoreset_mode=mode)
        self.space, self.seed = self.vector.single_action_space, derived(s.seed, "environment", 0)
        self.episodes = [0] * s.n_envs
        self.returns = numpy.zeros(s.n_envs)  # of the episodes under way
        self.finished: collections.deque[float] = collections.deque(maxlen=100)  # returns of the latest episodes
        self.observations = self.reset(numpy.ones(s.n_envs, dtype=bool))  # to act on next

    def reset(self, where: Any) -> Tensor:
        """Begin new episodes `where` [N] says so; all observations [N, D]."""
        seeds: list[int | None] = [None] * len(where)
        for i in where.nonzero()[0]:
            self.episodes[i] += 1
            seeds[i] = derived(self.seed, f"episodes of copy {i}", self.episodes[i]) % 2**31
        return self.as_tensor(self.vector.reset(seed=seeds, options={"reset_mask": where})[0])

    def step(self, actions: Any) -> tuple[Tensor, Any, Any, Any]:
        """Act everywhere. The observations that came of it [N, D], rewards, terminated and truncated [N]."""
        if isinstance(self.space, gymnasium.spaces.Box):  # a Gaussian knows no bounds
            actions = actions.clip(self.space.low, self.space.high)
        arrays, rewards, terminated, truncated, _ = self.vector.step(actions)
        self.observations = observations = self.as_tensor(arrays)
        self.returns += rewards
        if (ended := terminated | truncated).any():
            self.finished.extend(self.returns[ended].tolist())
            self.returns[ended] = 0
            self.observations = self.reset(ended)
        return observations, rewards, terminated, truncated

    def as_tensor(self, observations: Any) -> Tensor:
        return torch.as_tensor(observations, dtype=torch.float32).reshape(len(observations), -1)


class Policy(nn.Module):
    """Two towers that share nothing: the actor gives a distribution over actions, the critic a value."""

    def __init__(self, observation_size: int, space: Any, seed: int):
        super().__init__()
        self.is_discrete = isinstance(space, gymnasium.spaces.Discrete)
        self.n_outputs = int(space.n) if self.is_discrete else space.shape[0]
        torch.manual_seed(derived(seed, "network", 0))
        actor, critic = tower(observation_size), tower(observation_size)
        self.actor = nn.Sequential(*actor, nn.Linear(64, self.n_outputs))  # logits, or the mean of a Gaussian
        self.critic = nn.Sequential(*critic, nn.Linear(64, 1))
        # The standard deviation of a Gaussian does not depend on the observation.
        self.log_std = None if self.is_discrete else nn.Parameter(torch.zeros(self.n_outputs))
        # Orthogonal weights keep the length of what passes through (gain √2 makes up for tanh). Small last weights make all
        # actions about as probable at first: nothing is ruled out before it was tried.
        hidden = [(layer, 2**0.5) for layer in (*actor, *critic) if isinstance(layer, nn.Linear)]
        for layer, gain in (*hidden, (self.actor[-1], 0.01), (self.critic[-1], 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> tuple[Any, Tensor]:
        """The distribution of actions, and the value [N], of observations [N, D]."""
        outputs, values = self.actor(observations), self.critic(observations)[:, 0]
        if self.is_discrete:
            return torch.distributions.Categorical(logits=outputs, validate_args=False), values
        gaussians = torch.distributions.Normal(outputs, self.log_std.exp().expand_as(outputs), validate_args=False)
        return torch.distributions.Independent(gaussians, 1), values

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """All the randomness of one rollout, [T, N, outputs]."""
        shape = (n_steps, n_envs, self.n_outputs)
        if self.is_discrete:  # Gumbel's: the largest of logits plus this noise is a draw from their softmax
            return -torch.empty(shape).exponential_(generator=generator).log()
        return torch.randn(shape, generator=generator)

    def sample(self, distribution: Any, noise: Tensor | float) -> Tensor:
        """One action for each row; without noise the greedy one."""
        if self.is_discrete:
            return (distribution.logits + noise).argmax(-1)
        return distribution.mean + distribution.stddev * noise


def tower(width: int) -> list[nn.Module]:
    return [nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]


@torch.no_grad()
def collect(policy: Policy, envs: Envs, number: int, s: Settings) -> Batch:
    """Step 1: act, from where the last rollout left off. Episodes begin and end within it as they like."""
    noise = policy.noise(s.n_steps, s.n_envs, torch.Generator().manual_seed(derived(s.seed, "actions", number)))
    steps = []
    for t in range(s.n_steps):
        observations = envs.observations
        distribution, values = policy(observations)
        actions = policy.sample(distribution, noise[t])
        after, rewards, terminated, truncated = envs.step(actions.numpy())
        # Nothing more can be earned after a terminated episode. A time limit only hides what would have come:
        # that is worth what the critic says, and so it is where the rollout cuts an episode in two.
        next_values = policy(after)[1] * ~torch.from_numpy(terminated)
        ended = torch.from_numpy(terminated | truncated)
        rewards = torch.from_numpy(rewards).float()
        steps.append((observations, actions, distribution.log_prob(actions), values, rewards, next_values, ended))
    return Batch(*(torch.stack(column) for column in zip(*steps, strict=True)))


def advantages(batch: Batch, s: Settings) -> None:
    """Step 2: generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16), backwards in time.

    delta_t = r_t + gamma V(s_t+1) - V(s_t)        was this action better than the critic expected?
    A_t = delta_t + gamma lambda A_t+1             and what came of it, until the episode ended
    """
    deltas = batch.rewards + s.gamma * batch.next_values - batch.values
    batch.advantages, advantage = torch.zeros_like(deltas), torch.zeros(s.n_envs)
    for t in reversed(range(s.n_steps)):
        advantage = deltas[t] + s.gamma * s.gae_lambda * ~batch.ended[t] * advantage
        batch.advantages[t] = advantage
    batch.returns = batch.advantages + batch.values


def update(policy: Policy, optimizer: torch.optim.Adam, batch: Batch, number: int, s: Settings) -> dict[str, float]:
    """Step 3: one gradient step a minibatch, for some epochs. Returns means over the steps of all minibatches."""
    # Every step is a row by itself, one sub-environment after another.
    rows = {name: column.transpose(0, 1).flatten(0, 1) for name, column in vars(batch).items()}
    shuffle = torch.Generator().manual_seed(derived(s.seed, "minibatches", number))
    sums: collections.Counter[str] = collections.Counter()
    steps_seen, norms = 0, []
    n_rows = s.n_steps * s.n_envs
    epochs = [torch.randperm(n_rows, generator=shuffle) for _ in range(s.n_epochs)]
    for indices in [indices for order in epochs for indices in order.split(s.batch_size)]:
        loss, parts = losses(policy, {name: column[indices] for name, column in rows.items()}, s)
        sums.update({name: float(part.sum()) for name, part in parts.items()})
        steps_seen += len(indices)
        if s.target_kl is not None and float(parts["approx_kl"].mean()) > s.target_kl:
            break
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm)))
        optimizer.step()
    return {name: total / steps_seen for name, total in sums.items()} | {"grad_norm": sum(norms) / max(len(norms), 1)}


def losses(policy: Policy, rows: dict[str, Tensor], s: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, a mean over the rows of one minibatch, and what it is made of, by row."""
    distribution, values = policy(rows["observations"])
    logprobs, entropy = distribution.log_prob(rows["actions"]), distribution.entropy()
    advantages = rows["advantages"]
    if s.normalize_advantage and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()

    # The policy: raise the probability of actions with a positive advantage, lower the others. Once the ratio of new to old
    # probability has left 1 ± clip_range in the wanted direction, the clipped branch is constant: no more gradient.
    log_ratio = logprobs - rows["logprobs"]
    ratio = log_ratio.exp()
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - s.clip_range, 1 + s.clip_range) * advantages)

    # The critic should be right about the return.
    value_loss = (values - rows["returns"]) ** 2
    if s.clip_range_vf is not None:
        near_old = rows["values"] + (values - rows["values"]).clamp(-s.clip_range_vf, s.clip_range_vf)
        value_loss = torch.maximum(value_loss, (near_old - rows["returns"]) ** 2)

    loss = (policy_loss + s.vf_coef * value_loss - s.ent_coef * entropy).mean()
    parts = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": ratio - 1 - log_ratio,  # KL(old || new), estimated from old samples; never negative
        "clip_fraction": ((ratio - 1).abs() > s.clip_range).float(),
    }
    return loss, {name: part.detach() for name, part in parts.items()}


def train(make: Callable[[], Any], s: Settings, *, report: Callable[[dict[str, float]], None]) -> Policy:
    """All of it together: `make` makes one environment, and `report` gets the numbers of every update."""
    envs = Envs(make, s)
    policy = Policy(envs.observations.shape[1], envs.space, s.seed)
    optimizer = torch.optim.Adam(policy.parameters(), eps=s.adam_epsilon)
    updates = math.ceil(s.total_timesteps / (s.n_steps * s.n_envs))
    for number in range(updates):
        batch = collect(policy, envs, number, s)
        advantages(batch, s)
        optimizer.param_groups[0]["lr"] = s.learning_rate * (1 - number / updates if s.lr_schedule == "linear" else 1)
        measured = update(policy, optimizer, batch, number, s)
        reached = {"return": sum(envs.finished) / len(envs.finished)} if envs.finished else {}
        report({"update": number + 1, "timesteps": (number + 1) * s.n_steps * s.n_envs, **reached, **measured})
    envs.vector.close()
    return policy


@torch.no_grad()
def play(policy: Policy, make: Callable[[], Any]) -> float:
    """The return of one episode with greedy actions."""
    envs = Envs(make, Settings(n_envs=1, seed=1))
    while not envs.finished:
        envs.step(policy.sample(policy(envs.observations)[0], 0.0).numpy())
    envs.vector.close()
    return envs.finished[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="a Gymnasium id (default %(default)s)")
    for f in fields(Settings):
        flag = "--timesteps" if f.name == "total_timesteps" else "--" + f.name.replace("_", "-")
        kind = {"int": int, "str": str, "bool": lambda text: text.lower() == "true"}.get(str(f.type), float)
        help_text = f"{f.metadata['help']} (default {f.default})"
        parser.add_argument(flag, dest=f.name, type=kind, metavar="X", help=help_text)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    env_id = given.pop("env")
    torch.set_num_threads(1)  # in a network this small, threads would only wait for each other
    policy = train(lambda: gymnasium.make(env_id), Settings(**given), report=show)
    print(f"an episode with greedy actions: return {play(policy, lambda: gymnasium.make(env_id)):.1f}")


def show(row: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()

"""Policy × Gymnasium environment -> batch: `n_steps` of every sub-environment, episodes or parts of them."""

import contextlib
import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surefoot.config import EnvConfig, PPOConfig
from surefoot.core.running import RunningStats
from surefoot.core.seeds import derived_seed
from surefoot.envs.gym import LONGEST_REPLAY, Vector, VectorStep, action_range_notice
from surefoot.envs.observations import Arrays
from surefoot.errors import InputError
from surefoot.policies.base import ActingPolicy
from surefoot.rollout.base import Evaluated, Rollout
from surefoot.rollout.logprobs import fill_logprobs
from surefoot.rollout.opponents import OpponentPool
from surefoot.types import EPISODE_STARTS, Batch, Episode, Poll

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = dict[str, Tensor]
Advanced: TypeAlias = tuple[Tensor, VectorStep, dict[int, Episode]]
CLIP_REWARD = 10.0
LONGEST_EPISODE = 100_000  # steps of an evaluation: what has not ended by then never will
UNDER_WAY = ("returns", "discounted", "lengths")  # of a position, in a checkpoint
# Modules that compute something else in training mode.
CHANGE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
WINDOW = 100  # finished episodes that the means are taken over, as Stable-Baselines3 does


class Position:
    """Where a policy stands in a vector environment: what it acts on next, and the episodes under way [N]."""

    def __init__(self, policy: ActingPolicy, observations: Arrays, num_envs: int):
        self.policy, self.observations = policy, observations
        self.state = policy.initial_state(num_envs)  # recurrent, before them; empty without an LSTM
        self.episode_starts = torch.ones(num_envs, dtype=torch.bool, device=policy.device)
        self.returns, self.discounted = numpy.zeros(num_envs), numpy.zeros(num_envs)
        self.lengths = numpy.zeros(num_envs, dtype=numpy.int64)

    def advance(self, policy: ActingPolicy, env: Vector, prepared: Tensors, noise: Any) -> Advanced:
        """Act everywhere: the actions, what came of them, and the episodes that ended, by sub-environment."""
        starts = self.episode_starts
        actions, self.state = policy.act(prepared, self.state, episode_starts=starts, noise=noise)
        step = env.step(env_actions(env.action_space, actions.cpu().numpy()))
        self.observations = step.observations
        self.episode_starts = torch.from_numpy(step.episode_starts).to(policy.device)
        self.returns += step.rewards
        self.lengths += step.valid
        finished = {}
        for i in step.ended.nonzero()[0].tolist():
            cut, info = bool(step.truncated[i] and not step.terminated[i]), last_info(step.infos, i)
            finished[i] = Episode(float(self.returns[i]), int(self.lengths[i]), cut, info)
            self.returns[i] = self.lengths[i] = 0
        return actions, step, finished


@dataclass(eq=False)
class GymRollout(Rollout):
    """Collects batches of one policy in one vector environment, and evaluates it in another.

    The noise of update u is drawn from `seed` and u alone. The environment keeps the position, so that
    whoever collects next goes on there; everything else that a rollout depends on is in `state`.
    """

    unit = "timesteps"
    throughput = "throughput/steps_per_s"

    policy: ActingPolicy
    env: Vector
    _: KW_ONLY
    settings: EnvConfig
    ppo: PPOConfig
    seed: int
    make_evaluation: Callable[[], Vector] | None = None
    opponents: OpponentPool | None = None
    finished: deque[Episode] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)
    latest: VectorStep | None = field(default=None, init=False)
    _is_collecting: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.per_update = self.settings.n_steps * int(self.env.num_envs)
        self.can_evaluate = self.make_evaluation is not None
        self.notice = _notice(self.policy, self.env.action_space)

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """`count` timesteps from where the last call stopped; a batch [num_envs, steps] with log-probs."""
        started, steps = time.perf_counter(), count // self.env.num_envs
        if self.opponents is not None:
            self.opponents.begin(version)
        at, n = self.env.position, self.env.num_envs
        if at is not None and at.policy is not self.policy:  # another's episodes, and its statistics
            at, self.env.reward_stats = None, RunningStats()
        is_new = at is None
        at = self.env.position = at or Position(self.policy, self.env.reset(), n)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "actions", version))
        noise = self.policy.noise(steps, n, generator)
        buffer = RolloutBuffer(at.state)
        prepared = self.policy.prepare(at.observations, learn=is_new)
        self._is_collecting = True
        try:
            with self.policy.acting():
                for t in range(steps):
                    if poll is not None:
                        poll()
                    prepared = self._step(at, buffer, prepared, noise[t])
        finally:
            self._is_collecting = False
        # Where the rollout cuts an episode, what would have come is worth V(next observation).
        last_values = self.policy.values(prepared, at.state, episode_starts=at.episode_starts)
        batch = buffer.batch(last_values, version=version, recurrent=self.policy.reads_whole_rows)
        buffer.steps.clear()  # they are in the batch now
        rolled = time.perf_counter()
        exact = self.policy.exact_logprobs
        fill_logprobs(self.policy, batch, token_budget=self.ppo.micro_batch_tokens, exact_logprobs=exact)
        self.finished.extend(buffer.episodes)
        batch.trajectories = buffer.episodes
        batch.metrics = episode_metrics(list(self.finished), "rollout") if self.finished else {}
        if self.opponents is not None:
            batch.metrics |= self.opponents.count(buffer.episodes)
        batch.metrics |= {"time/rollout_s": rolled - started, "time/score_s": time.perf_counter() - rolled}
        return batch

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """Run whole episodes with greedy actions, from the same seeds every time."""
        assert self.make_evaluation is not None
        with contextlib.closing(self.make_evaluation()) as env:
            finished = run_episodes(self.policy, env, episodes, poll=poll)
        return episode_metrics(finished, "eval"), finished

    def start_over(self) -> None:
        """Begin new episodes: somebody has stepped the environment. Raises InputError during a rollout."""
        if self._is_collecting:
            raise InputError("the training environment is in the middle of a rollout; evaluate in another")
        self.env.position = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: JSON, and arrays that become lists in it; large `tensors` apart."""
        pool, at = self.opponents, self.env.position
        state: dict[str, Any] = {
            "policy": self.policy.state(),
            "reward_stats": asdict(self.env.reward_stats),
            "finished": [(e.total, e.steps, e.truncated, e.info) for e in self.finished],
            "env": None if at is None else self.env.state(),
        }
        if at is not None:
            state |= {name: getattr(at, name).copy() for name in UNDER_WAY}
            state |= {"state": at.state, "observations": _digest(at.observations)}
        return state | ({} if pool is None else {"opponents": pool.state(), "tensors": pool.tensors()})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. An environment that cannot repeat its episodes begins new ones.

        In the process that has played them it is left where it stands.
        """
        standing = None if self.env.repeats_itself or self.opponents else self.env.position
        self.policy.restore(state["policy"])
        self.env.reward_stats = RunningStats(**state["reward_stats"])
        self.finished = deque((Episode(*episode) for episode in state["finished"]), maxlen=WINDOW)
        self.env.position = None
        if self.opponents is not None:
            self.opponents.restore(state["opponents"], state["tensors"])
        env = state["env"]
        observations = None if env is None else self.env.restore(env)
        if self.opponents is not None:
            self.opponents.go_on()
        if env is None:
            return
        if standing is not None:
            self.env.position = standing
            return
        if observations is None or _digest(observations) != state["observations"]:
            why = "does not repeat itself from its seed and actions"
            if not self.env.reseed:
                why = "was given without a seed, so that what was under way is not repeated"
            elif observations is None:
                why = f"cannot be put back: not begun from a seed, or over {LONGEST_REPLAY} steps ago"
            print(f"surefoot: env {self.env.name} {why}; new episodes begin", file=sys.stderr)
            return
        at = self.env.position = Position(self.policy, observations, self.env.num_envs)
        for name in UNDER_WAY:
            fresh = getattr(at, name)
            setattr(at, name, numpy.array(state[name], fresh.dtype).reshape(fresh.shape))
        at.episode_starts = torch.from_numpy(at.lengths == 0).to(self.policy.device)
        at.state = {n: torch.as_tensor(v, device=self.policy.device) for n, v in state["state"].items()}

    def _step(self, at: Position, buffer: "RolloutBuffer", prepared: Tensors, noise: Any) -> Tensors:
        """One step everywhere, added to `buffer`; what to act on next."""
        starts = at.episode_starts
        actions, step, finished = at.advance(self.policy, self.env, prepared, noise)
        self.latest = step
        buffer.episodes += finished.values()
        if step.final_observations is not None and step.truncated.any():
            # A time limit is not an end: what would have come is worth V(final observation).
            final = self.policy.prepare(step.final_observations)
            values = self.policy.values(final, at.state, episode_starts=torch.zeros_like(starts)).cpu()
            is_cut = torch.from_numpy(step.truncated & ~step.terminated)
            buffer.bootstraps[len(buffer.steps)] = torch.where(is_cut, values, 0.0)
        buffer.steps.append((prepared, actions, starts, self._rewards(at, step), step.valid, step.ended))
        return self.policy.prepare(step.observations, learn=True)

    def _rewards(self, at: Position, step: VectorStep) -> NDArray[numpy.float64]:
        """The rewards to learn from."""
        if not self.settings.normalize_rewards:
            return step.rewards
        at.discounted = at.discounted * self.ppo.gamma + step.rewards
        stats = self.env.reward_stats = self.env.reward_stats.updated(at.discounted[step.valid].tolist())
        at.discounted[step.ended] = 0
        return numpy.clip(step.rewards / (stats.std + 1e-8), -CLIP_REWARD, CLIP_REWARD)


def _notice(policy: ActingPolicy, action_space: Any) -> str:
    """What will train badly or otherwise than expected, in lines."""
    std = getattr(getattr(policy, "head", None), "log_std", torch.zeros(())).exp().mean().item()
    lines = [action_range_notice(action_space, std)]
    modules = policy.modules() if isinstance(policy, nn.Module) else ()
    kept = sorted({type(module).__name__ for module in modules if isinstance(module, CHANGE_IN_TRAINING)})
    if kept:
        why = "the policy that learns is the one that acted"
        lines += [f"policy: {' and '.join(kept)} of your network stay in evaluation mode: {why}"]
    return "\n".join(filter(None, lines))


class RolloutBuffer:
    """The steps of a rollout."""

    def __init__(self, state: Tensors):
        self.state = state  # recurrent, before the first step
        # Observations, actions, where an episode began with them, rewards, which are valid, which ended.
        self.steps: list[tuple[Tensors, Tensor, Tensor, Array, Array, Array]] = []
        self.episodes: list[Episode] = []  # that ended
        self.bootstraps: dict[int, Tensor] = {}  # by step, where a time limit ended an episode

    def batch(self, last_values_B: Tensor, *, version: int, recurrent: bool) -> Batch:
        """All [B, T], log-probs and values still 0. Where it cuts episodes, `last_values_B` follow."""
        observed, actions, starts, *arrays = zip(*self.steps, strict=True)
        device, steps_T = actions[0].device, torch.arange(len(actions))
        rewards_BT, valid_BT, ends_BT = (torch.from_numpy(numpy.stack(column, 1)) for column in arrays)
        bootstrap_BT = torch.zeros(valid_BT.shape)
        for t, values_B in self.bootstraps.items():
            bootstrap_BT[:, t] = values_B
        last_B = torch.where(valid_BT, steps_T, -1).amax(1)
        cut_BT = (steps_T == last_B[:, None]) & ~ends_BT
        bootstrap_BT = torch.where(cut_BT, last_values_B.cpu()[:, None], bootstrap_BT)
        observations = {name: torch.stack([each[name] for each in observed], 1) for name in observed[0]}
        if recurrent:
            observations |= {name: values[:, None] for name, values in self.state.items()}
            observations[EPISODE_STARTS] = torch.stack(starts, 1)
        return Batch(
            observations=observations,
            actions_BT=torch.stack(actions, 1),
            mask_BT=valid_BT.to(device),
            logprobs_BT=torch.zeros(valid_BT.shape, device=device),
            values_BT=torch.zeros(valid_BT.shape, device=device),
            rewards_BT=rewards_BT.float().to(device),
            ends_BT=(ends_BT | cut_BT).to(device),
            bootstrap_BT=bootstrap_BT.to(device),
            needs_logprobs=True,
            row_size=len(actions),
            collected=valid_BT.numel(),
            version=version,
        )


def run_episodes(
    policy: ActingPolicy,
    env: Vector,
    episodes: int,
    *,
    poll: Poll = None,
    on_step: Callable[[VectorStep], None] | None = None,
    seed: int | None = None,
) -> list[Episode]:
    """`episodes` whole episodes with greedy actions, or, with a `seed`, with sampled ones.

    Each sub-environment runs an equal share: taking the first that end would favor short ones. `on_step` is
    shown each step. Raises InputError for an episode that does not end.
    """
    n, generator = env.num_envs, torch.Generator().manual_seed(seed or 0)
    shares = [episodes // n + (i < episodes % n) for i in range(n)]
    finished: list[list[Episode]] = [[] for _ in range(n)]
    at = Position(policy, env.reset(), n)
    while sum(map(len, finished)) < episodes:
        if poll is not None:
            poll()
        noise = None if seed is None else policy.noise(1, n, generator)[0]
        _, step, ended = at.advance(policy, env, policy.prepare(at.observations), noise)
        if on_step is not None:
            on_step(step)
        for i, episode in ended.items():
            finished[i] = [*finished[i], episode][: shares[i]]
        if at.lengths.max() > LONGEST_EPISODE:
            why = f"env {env.name}: an episode has not ended after {LONGEST_EPISODE} steps"
            limit = "give it a time limit (env.kwargs: {max_episode_steps: 1000})"
            raise InputError(f"{why}; {limit}, or set evaluate.episodes: 0")
    return [episode for own in finished for episode in own]


def _digest(observations: Arrays) -> str:
    parts = [name.encode() + values.tobytes() for name, values in sorted(observations.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def env_actions(space: Any, actions: NDArray[Any]) -> NDArray[Any]:
    """Actions as the environment takes them: clipped to their bounds, or counted from the space's start."""
    if type(space).__name__ == "Box":
        return numpy.asarray(numpy.clip(actions, space.low, space.high), dtype=space.dtype)
    start = getattr(space, "start", 0)
    return actions + start if numpy.any(start) else actions


def last_info(infos: Mapping[str, Any], index: int) -> dict[str, float]:
    """The numbers in the last info of the episode that ended in sub-environment `index`."""
    final = infos.get("final_info", infos)
    numbers: dict[str, float] = {}
    for name, values in final.items() if isinstance(final, Mapping) else ():
        is_column = isinstance(values, numpy.ndarray) and values.ndim == 1 and len(values) > index
        if name.startswith("_") or not is_column or not final.get(f"_{name}", numpy.ones(len(values)))[index]:
            continue
        # An array of objects comes where the environment gave NumPy's own numbers.
        if isinstance(value := values[index], (bool, int, float, numpy.bool_, numpy.number)):
            numbers[name] = float(value)
    return numbers


def episode_metrics(episodes: list[Episode], prefix: str) -> dict[str, float]:
    """Means over finished episodes, under `rollout/` by Stable-Baselines3's names or under `eval/`."""
    totals = [episode.total for episode in episodes]
    mean, steps = sum(totals) / len(totals), sum(episode.steps for episode in episodes) / len(totals)
    if prefix == "rollout":
        return {"rollout/ep_rew_mean": mean, "rollout/ep_len_mean": steps}
    std = (sum((total - mean) ** 2 for total in totals) / len(totals)) ** 0.5
    return {"eval/reward": mean, "eval/reward_std": std, "eval/metric": mean, "eval/length": steps}

"""Policy × Gymnasium environment -> batch: `n_steps` of every copy, whatever episodes begin and end in them."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.config import EnvConfig, PPOConfig
from surefoot.core.seeds import derived_seed
from surefoot.envs.gym import LONGEST_REPLAY, Vector, VectorStep
from surefoot.envs.observations import Arrays
from surefoot.errors import InputError
from surefoot.policies.base import ActingPolicy
from surefoot.rollout.logprobs import fill_logprobs
from surefoot.rollout.opponents import OpponentPool
from surefoot.types import STARTS, Batch, Episode

CLIP_REWARD = 10.0
LONGEST_EPISODE = 100_000  # steps of an evaluation: what has not ended by then never will
WINDOW = 100  # finished episodes that the means are taken over, as Stable-Baselines3 does


class GymRollout:
    """Collects batches of one policy in one vector environment, and evaluates it in another.

    The noise of update u is drawn from `seed` and u alone. Everything else that a rollout depends on is in `state`.
    """

    unit = "timesteps"
    throughput = "throughput/steps_per_s"

    def __init__(
        self,
        policy: ActingPolicy,
        env: Vector,
        *,
        settings: EnvConfig,
        ppo: PPOConfig,
        seed: int,
        make_evaluation: Callable[[], Vector] | None = None,
        league: OpponentPool | None = None,
    ):
        self.policy, self.env, self.settings, self.ppo, self.seed = policy, env, settings, ppo, seed
        self.make_evaluation, self.league = make_evaluation, league
        self.finished: deque[Episode] = deque(maxlen=WINDOW)
        self._new: list[Episode] = []  # finished in this rollout
        self._is_playing = False
        self.latest: VectorStep | None = None  # for callbacks
        self._observations: Arrays | None = None  # to act on next; None before the first reset
        self._begin()

    @property
    def per_update(self) -> int:
        """Timesteps in one update, all copies together."""
        return self.settings.n_steps * int(self.env.num_envs)

    @property
    def can_evaluate(self) -> bool:
        """Whether there is an environment of its own to evaluate in."""
        return self.make_evaluation is not None

    def collect(
        self, *, first: int, count: int, version: int = 0, poll: Callable[[], None] | None = None
    ) -> Batch:
        """`count` timesteps from where the last call left off; a batch [num_envs, n_steps] with log-probs and values."""
        started = time.perf_counter()
        steps = count // self.env.num_envs
        is_new, self._new = self._observations is None, []
        if self.league is not None:
            self.league.begin(version)
        if self._observations is None:
            self._observations = self.env.reset()
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "actions", version))
        noise = self.policy.noise(steps, self.env.num_envs, generator)
        played = RolloutBuffer()
        prepared = self.policy.prepare(self._observations, learn=is_new)
        self._is_playing = True
        try:
            with self.policy.acting():
                for t in range(steps):
                    if poll is not None:
                        poll()
                    prepared = self._step(t, prepared, noise[t], played)
        finally:
            self._is_playing = False
        # Where the rollout cuts an episode, what would have come is worth V(next observation).
        last_values = self.policy.values(prepared, self._memory, starts=self._starts)
        batch = played.batch(last_values, version=version, recurrent=self.policy.reads_whole_rows)
        del played  # its steps are in the batch now
        rolled = time.perf_counter()
        fill_logprobs(
            self.policy,
            batch,
            token_budget=self.ppo.micro_batch_tokens,
            exact_logprobs=self.policy.exact_logprobs,
        )
        self.finished.extend(self._new)
        batch.trajectories = self._new
        batch.metrics = episode_metrics(list(self.finished), "rollout") if self.finished else {}
        if self.league is not None:
            batch.metrics |= self.league.count(self._new)
        batch.metrics |= {"time/rollout_s": rolled - started, "time/score_s": time.perf_counter() - rolled}
        return batch

    def evaluate(
        self, episodes: int, *, poll: Callable[[], None] | None = None
    ) -> tuple[dict[str, float], list[Episode]]:
        """Play whole episodes with the likeliest actions, from the same seeds every time."""
        assert self.make_evaluation is not None
        env = self.make_evaluation()
        try:
            played = play(self.policy, env, episodes, poll=poll)
        finally:
            env.close()
        return episode_metrics(played, "eval"), played

    def start_over(self) -> None:
        """Begin new episodes: somebody else has stepped the environment. Raises InputError in the middle of a rollout."""
        if self._is_playing:
            raise InputError(
                "the training environment is in the middle of a rollout; evaluate in another one"
            )
        self._observations = None
        self._begin()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: JSON, but for arrays and tensors that become lists in it, and large `tensors`."""
        league = (
            {} if self.league is None else {"league": self.league.state(), "tensors": self.league.tensors()}
        )
        return league | {
            "env": None if self._observations is None else self.env.state(),
            "seen": None if self._observations is None else digest(self._observations),
            "policy": self.policy.state(),
            "totals": self._totals.copy(),
            "lengths": self._lengths.copy(),
            "discounted": self._discounted.copy(),
            "memory": self._memory,
            "finished": [(e.total, e.steps, e.truncated, e.info) for e in self.finished],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. An environment that does not repeat itself begins its episodes anew."""
        self.policy.restore(state["policy"])
        self.finished = deque((Episode(*episode) for episode in state["finished"]), maxlen=WINDOW)
        self._begin()
        if self.league is not None:
            self.league.restore(state["league"], state["tensors"])
        self._observations = None if state["env"] is None else self.env.restore(state["env"])
        if self.league is not None:
            self.league.go_on()
        if state["env"] is not None and (
            self._observations is None or digest(self._observations) != state["seen"]
        ):
            self._observations = None
            why = "does not repeat itself from its seed and actions"
            if not self.env.repeats_itself:
                why = "cannot be put back"
            elif state["env"]["actions"] is None:
                why = f"is too far into an episode to play it again (over {LONGEST_REPLAY} steps)"
            print(f"surefoot: env {self.env.name} {why}; its episodes under way begin anew", file=sys.stderr)
        if self._observations is None:
            return
        self._totals, self._discounted = numpy.array(state["totals"]), numpy.array(state["discounted"])
        self._lengths = numpy.array(state["lengths"])
        self._starts = torch.from_numpy(self._lengths == 0).to(self.policy.device)
        self._memory = {n: torch.as_tensor(v, device=self.policy.device) for n, v in state["memory"].items()}

    def _begin(self) -> None:
        copies = self.env.num_envs
        self._totals, self._discounted = numpy.zeros(copies), numpy.zeros(copies)
        self._lengths = numpy.zeros(copies, dtype=numpy.int64)
        self._starts = torch.ones(copies, dtype=torch.bool, device=self.policy.device)
        self._memory = self.policy.initial_state(copies)

    def _step(
        self, t: int, prepared: dict[str, Tensor], noise: Any, played: RolloutBuffer
    ) -> dict[str, Tensor]:
        """One step of all copies, written into `played`; what to act on next."""
        if t == 0:
            played.memory = self._memory
        actions, memory = self.policy.act(prepared, self._memory, starts=self._starts, noise=noise)
        step = self.latest = self.env.step(env_actions(self.env.action_space, actions.cpu().numpy()))
        ended = step.terminated | step.truncated
        rewards = self._rewards(step, ended)
        played.add(step, rewards, (prepared, actions, self._starts))
        if step.final_observations is not None and step.truncated.any():
            # A time limit is not an end: what would have come is worth V(final observation).
            final = self.policy.values(
                self.policy.prepare(step.final_observations), memory, starts=torch.zeros_like(self._starts)
            )
            played.bootstraps[t] = torch.where(
                torch.from_numpy(step.truncated & ~step.terminated), final.cpu(), 0.0
            )
        self._observations, self._memory = step.observations, memory
        # After a step that only reset, and where we or the environment have reset within the step, an episode begins.
        begins = ~step.real if self.env.resets_in_a_step_of_its_own else ended
        self._starts = torch.from_numpy(begins).to(self.policy.device)
        return self.policy.prepare(step.observations, learn=True)

    def _rewards(self, step: VectorStep, ended: NDArray[numpy.bool_]) -> NDArray[numpy.float64]:
        """The rewards to learn from; counts the episodes."""
        rewards = numpy.where(step.real, step.rewards, 0.0)
        self._totals += rewards
        self._lengths += step.real
        scaled = rewards
        if self.settings.normalize_rewards:
            self._discounted = self._discounted * self.ppo.gamma + rewards
            stats = self.policy.reward_stats = self.policy.reward_stats.updated(
                self._discounted[step.real].tolist()
            )
            scaled = numpy.clip(rewards / (stats.std + 1e-8), -CLIP_REWARD, CLIP_REWARD)
        for i in ended.nonzero()[0]:
            info = last_info(step.infos, int(i))
            cut = bool(step.truncated[i] and not step.terminated[i])
            self._new.append(Episode(float(self._totals[i]), int(self._lengths[i]), cut, info))
            self._totals[i] = self._discounted[i] = self._lengths[i] = 0
        return scaled


class RolloutBuffer:
    """What a rollout has seen so far, one entry a step."""

    def __init__(self) -> None:
        self.observations: list[dict[str, Tensor]] = []
        self.actions: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.rewards: list[NDArray[numpy.float64]] = []
        self.real: list[NDArray[numpy.bool_]] = []
        self.ends: list[NDArray[numpy.bool_]] = []
        self.bootstraps: dict[int, Tensor] = {}  # by step, where a time limit ended an episode
        self.memory: dict[str, Tensor] = {}  # before the first step

    def add(
        self,
        step: VectorStep,
        rewards: NDArray[numpy.float64],
        acted: tuple[dict[str, Tensor], Tensor, Tensor],
    ) -> None:
        """Write down a step: what was seen, done and paid."""
        observations, actions, starts = acted
        self.observations.append(observations)
        self.actions.append(actions)
        self.starts.append(starts)
        self.rewards.append(rewards)
        self.real.append(step.real)
        self.ends.append(step.terminated | step.truncated)

    def batch(self, last_values_B: Tensor, *, version: int, recurrent: bool) -> Batch:
        """All of it [B, T], without log-probs and values as yet. An episode under way goes on, worth `last_values_B`."""
        steps, copies, device = len(self.actions), len(self.actions[0]), self.actions[0].device
        real_TB, ends_TB = torch.from_numpy(numpy.stack(self.real)), torch.from_numpy(numpy.stack(self.ends))
        bootstrap_TB = torch.zeros(steps, copies)
        for t, values_B in self.bootstraps.items():
            bootstrap_TB[t] = values_B
        last_B = torch.where(real_TB, torch.arange(steps)[:, None], -1).amax(0)
        cut_TB = (torch.arange(steps)[:, None] == last_B) & ~ends_TB
        bootstrap_TB = torch.where(cut_TB, last_values_B.cpu(), bootstrap_TB)

        def turned(values_TB: Tensor) -> Tensor:
            return values_TB.transpose(0, 1).contiguous().to(device)

        observations = {
            name: torch.stack([seen[name] for seen in self.observations], 1) for name in self.observations[0]
        }
        if recurrent:
            observations |= {name: values[:, None] for name, values in self.memory.items()}
            observations[STARTS] = torch.stack(self.starts, 1)
        return Batch(
            observations=observations,
            actions_BT=torch.stack(self.actions, 1),
            mask_BT=turned(real_TB),
            logprobs_BT=torch.zeros(copies, steps, device=device),
            values_BT=torch.zeros(copies, steps, device=device),
            rewards_BT=turned(torch.from_numpy(numpy.stack(self.rewards)).float()),
            ends_BT=turned(ends_TB | cut_TB),
            bootstrap_BT=turned(bootstrap_TB),
            needs_logprobs=True,
            row_size=steps,
            collected=steps * copies,
            version=version,
        )


def play(
    policy: ActingPolicy,
    env: Vector,
    episodes: int,
    *,
    poll: Callable[[], None] | None = None,
    seen: Callable[[VectorStep], None] | None = None,
    seed: int | None = None,
) -> list[Episode]:
    """Play `episodes` whole episodes with the likeliest actions, or, with a `seed`, with sampled ones.

    Each copy plays an equal share: taking the first that end would favour short ones. `seen` is shown each step.
    Raises InputError for an episode that does not end.
    """
    copies, generator = env.num_envs, torch.Generator().manual_seed(seed or 0)
    shares = [episodes // copies + (i < episodes % copies) for i in range(copies)]
    played: list[list[Episode]] = [[] for _ in range(copies)]
    observations, state = env.reset(), policy.initial_state(copies)
    totals, lengths = numpy.zeros(copies), numpy.zeros(copies, dtype=numpy.int64)
    starts = torch.ones(copies, dtype=torch.bool, device=policy.device)
    while any(len(own) < share for own, share in zip(played, shares, strict=True)):
        if poll is not None:
            poll()
        noise = None if seed is None else policy.noise(1, copies, generator)[0]
        actions, state = policy.act(policy.prepare(observations), state, starts=starts, noise=noise)
        step = env.step(env_actions(env.action_space, actions.cpu().numpy()))
        if seen is not None:
            seen(step)
        ended = step.terminated | step.truncated
        totals += numpy.where(step.real, step.rewards, 0.0)
        lengths += step.real
        if lengths.max() > LONGEST_EPISODE:
            raise InputError(
                f"env {env.name}: an episode has not ended after {LONGEST_EPISODE} steps; give it a time limit "
                "(env.kwargs: {max_episode_steps: 1000}), or do without evaluation (evaluate.episodes: 0)"
            )
        for i in ended.nonzero()[0]:
            if len(played[i]) < shares[i]:
                cut = bool(step.truncated[i] and not step.terminated[i])
                played[i].append(
                    Episode(float(totals[i]), int(lengths[i]), cut, last_info(step.infos, int(i)))
                )
            totals[i] = lengths[i] = 0
        observations = step.observations
        starts = torch.from_numpy(~step.real if env.resets_in_a_step_of_its_own else ended).to(policy.device)
    return [episode for own in played for episode in own]


def digest(observations: Arrays) -> str:
    """A checksum of observations, to tell whether an environment was put back where it was."""
    found = hashlib.sha256()
    for name, values in sorted(observations.items()):
        found.update(name.encode() + numpy.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def env_actions(space: Any, actions: NDArray[Any]) -> NDArray[Any]:
    """Actions as the environment takes them: continuous ones clipped to their bounds, counts from the space's start."""
    if type(space).__name__ == "Box":
        clipped: NDArray[Any] = numpy.clip(actions, space.low, space.high).astype(space.dtype)
        return clipped
    start = getattr(space, "start", 0)
    return actions + start if numpy.any(start) else actions


def last_info(infos: Mapping[str, Any], copy: int) -> dict[str, float]:
    """The numbers in an ended episode's last info."""
    final = infos.get("final_info", infos)
    numbers: dict[str, float] = {}
    if not isinstance(final, Mapping):
        return numbers
    for name, values in final.items():
        if (
            name.startswith("_")
            or not isinstance(values, numpy.ndarray)
            or values.ndim != 1
            or len(values) <= copy
        ):
            continue
        value, has_it = values[copy], final.get(f"_{name}", numpy.ones(len(values)))[copy]
        # An array of objects comes where the environment gave NumPy's own numbers.
        if has_it and isinstance(value, (bool, int, float, numpy.bool_, numpy.number)):
            numbers[name] = float(value)
    return numbers


def episode_metrics(episodes: list[Episode], prefix: str) -> dict[str, float]:
    """Means over finished episodes, under `rollout/` by Stable-Baselines3's names or under `eval/`."""
    totals = [episode.total for episode in episodes]
    mean, steps = sum(totals) / len(totals), sum(episode.steps for episode in episodes) / len(totals)
    if prefix == "rollout":
        return {"rollout/ep_rew_mean": mean, "rollout/ep_len_mean": steps}
    deviation = (sum((total - mean) ** 2 for total in totals) / len(totals)) ** 0.5
    return {"eval/reward": mean, "eval/reward_std": deviation, "eval/metric": mean, "eval/length": steps}

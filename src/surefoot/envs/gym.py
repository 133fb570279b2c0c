"""Gymnasium's vector environments, whatever their autoreset mode, with observations by name.

`step` always gives the observations to act on next, the true final observation of an episode that ended, and
which of the transitions are valid. Environments that we make are reset by us, each episode from its own seed:
seed and actions repeat an episode exactly, and that is how a resumed run finds its environments as they were.
With `reseed=False` an environment is reset as in plain Gymnasium, first from a seed and then without: what it
draws and remembers goes on, and a resumed run begins new episodes.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeAlias

import gymnasium
import numpy
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from surefoot.core.running import RunningStats
from surefoot.core.seeds import derived_seed
from surefoot.data.user_code import Guard
from surefoot.envs.observations import Arrays, Checks, check_sizes, choices, flat, leaves, mask_width
from surefoot.envs.spaces import save_spaces
from surefoot.errors import InputError
from surefoot.rewards.functions import LARGEST_REWARD
from surefoot.types import ACTION_MASK, OBSERVATION

Flags: TypeAlias = NDArray[numpy.bool_]

REWARD_STATS = "reward_normalization.json"
UNBOUNDED = 1e30  # a range as wide is none
LONGEST_REPLAY = 20_000  # steps of an episode that are kept so that a resumed run can repeat it


@dataclass
class VectorStep:
    """One step of all N sub-environments."""

    observations: Arrays  # to act on next
    rewards: NDArray[numpy.float64]  # 0 where not valid
    terminated: Flags
    truncated: Flags
    ended: Flags  # either of them
    valid: Flags  # False where the step only reset: nothing was acted on
    episode_starts: Flags  # an episode begins with `observations`
    final_observations: Arrays | None  # where an episode ended, its last observation; None if none did
    infos: dict[str, Any]
    actions: NDArray[Any]

    def infos_by_env(self) -> list[dict[str, Any]]:
        """The dictionary of arrays as the list of dictionaries that Stable-Baselines3 has."""
        found = _by_env(self.infos, len(self.rewards))
        for i in self.ended.nonzero()[0].tolist():
            found[i]["TimeLimit.truncated"] = bool(self.truncated[i] and not self.terminated[i])
            if self.final_observations is not None:
                last = {name: values[i] for name, values in self.final_observations.items()}
                found[i]["terminal_observation"] = last.get(OBSERVATION, last)
        return found


class Vector:
    """A vector environment of any autoreset mode.

    `observation_spaces` (the leaves of the space by name) and `action_space` are those of one
    sub-environment. Raises InputError for spaces that cannot be trained on, and, while stepping, for an
    environment that fails and for what `Checks` refuses.
    """

    def __init__(self, env: Any, *, seed: int | None, name: str | None = None, reseed: bool = True):
        self.env, self.seed, self.num_envs = env, seed or 0, env.num_envs
        self.reseed, self._seeds_next = reseed, seed is not None
        self.name = name or env_name(env)
        self._guard = Guard(f"env {self.name}", "failed:")
        self.mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self._resets_here = self.mode == AutoresetMode.DISABLED
        # Whether episodes are begun by us from a seed, so that they can be repeated.
        self.repeats_itself = self._resets_here and self.reseed
        check_sizes(env.single_observation_space, env.single_action_space)
        self.observation_spaces = leaves(env.single_observation_space)
        self.action_space = env.single_action_space
        # Whether the sub-environments name their legal actions as sb3-contrib has it.
        is_theirs = hasattr(env, "venv")  # vec_env.py
        self._masks_by_call = (
            ACTION_MASK not in self.observation_spaces
            and (
                isinstance(env, (gymnasium.vector.SyncVectorEnv, gymnasium.vector.AsyncVectorEnv))
                or is_theirs
            )
            and all(self._guarded(env.call, "has_wrapper_attr", "action_masks"))
        )
        if self._masks_by_call:
            self.observation_spaces[ACTION_MASK] = spaces.MultiBinary(mask_width(self.action_space))
        self.checks = Checks(self.observation_spaces, self.action_space, name=self.name)
        # How many episodes each sub-environment has begun.
        self.episodes = numpy.zeros(self.num_envs, dtype=numpy.int64)
        self.actions: list[list[Any]] = [[] for _ in range(self.num_envs)]  # of the episodes under way
        self._just_ended = numpy.zeros(self.num_envs, dtype=numpy.bool_)
        self.position: Any = None  # where a rollout stands here (rollout/gym.py); None: at no episode
        self.reward_stats = RunningStats()  # of discounted returns, by which a rollout may normalize rewards

    def check_same_spaces(self, other: "Vector") -> None:
        """Raise InputError if a policy for `other` does not fit here."""
        mine, others = ({**v.observation_spaces, "action": v.action_space} for v in (self, other))
        for name in sorted(mine.keys() | others.keys()):
            here, wanted = mine.get(name), others.get(name)
            fits = here == wanted
            if name != "action" and isinstance(here, spaces.Box) and isinstance(wanted, spaces.Box):
                fits = here.shape == wanted.shape  # the bounds of observations are not enforced
            if not fits:
                raise InputError(f"env {self.name}: its {name} space is {here}; the policy is for {wanted}")

    def reset(self) -> Arrays:
        """Begin an episode in every sub-environment."""
        if self._resets_here:
            return self._reset_where(numpy.ones(self.num_envs, dtype=numpy.bool_))
        self.episodes += 1
        self._just_ended[:] = False
        # An environment's native vectorized form takes one number, from which it counts up.
        seed, self._seeds_next = self._seed_of(0) if self._seeds_next else None, self.reseed
        return self._arrays(self._guarded(self.env.reset, seed=seed)[0])

    def step(self, actions: NDArray[Any]) -> VectorStep:
        """Act in every sub-environment. `actions` [N, ...] must lie in the action space."""
        if self.repeats_itself:
            for history, action in zip(self.actions, actions, strict=True):
                if len(history) <= LONGEST_REPLAY:
                    history.append(action)
        # Copied: an environment may change what it is given, and these are in the batch and in the history.
        observations, rewards, terminated, truncated, infos = self._guarded(self.env.step, actions.copy())
        if not isinstance(infos, dict):
            kind = type(infos).__name__
            raise InputError(f"env {self.name}: its infos are a {kind}; leave DictInfoToList out")
        valid = ~self._just_ended
        ended = (terminated | truncated) & valid
        starts, final = ended, None
        arrays = self._arrays(observations, None if self.mode == AutoresetMode.SAME_STEP else ended)
        if self.mode == AutoresetMode.NEXT_STEP:
            self._just_ended, starts = ended, ~valid
            final = arrays if ended.any() else None
        elif ended.any():
            if self._resets_here:
                final, arrays = arrays, self._reset_where(ended)
            else:
                final = self._final_observations(arrays, infos, ended)
        rewards = numpy.where(valid, numpy.asarray(rewards, dtype=numpy.float64), 0.0)
        if not (is_right := numpy.abs(rewards) <= LARGEST_REWARD).all():  # nor is NaN
            index = int(numpy.argmin(is_right))
            found = f"env {self.name}: the reward of sub-environment {index} is {rewards[index]}"
            raise InputError(f"{found}; a number of at most ±{LARGEST_REWARD:g} is needed")
        ends = (terminated & valid, truncated & valid, ended)
        return VectorStep(arrays, rewards, *ends, valid, starts, final, infos, actions)

    def state(self) -> dict[str, Any]:
        """Seeds and actions of the episodes under way, if they can be repeated: JSON, but for arrays."""
        is_kept = self.repeats_itself and max(map(len, self.actions)) <= LONGEST_REPLAY
        actions = [history[:] for history in self.actions] if is_kept else None
        return {"episodes": self.episodes.copy(), "actions": actions}

    def restore(self, state: dict[str, Any]) -> Arrays | None:
        """Repeat the episodes under way: what to act on, or None. Raises InputError for another num_envs."""
        if (n := len(state["episodes"])) != self.num_envs:
            raise InputError(f"env: the run has num_envs {n}, the environment given has {self.num_envs}")
        self.episodes[:] = state["episodes"]
        if state["actions"] is None or not self.repeats_itself:
            return None
        dtype = self.action_space.dtype
        self.actions = [[numpy.asarray(a, dtype=dtype) for a in history] for history in state["actions"]]
        longest = max(map(len, self.actions))
        # All end their replay together: one with a short history waits, acting anyhow, until its reset.
        begins = numpy.array([longest - len(history) for history in self.actions])
        to_reset = numpy.ones(self.num_envs, dtype=numpy.bool_)
        for t in range(longest + 1):
            if to_reset.any():
                observations = self._reset_raw(to_reset)
            if t == longest:
                break
            actions = [
                history[t - begin] if t >= begin else self._any_action(observations, i)
                for i, (history, begin) in enumerate(zip(self.actions, begins, strict=True))
            ]
            observations, _, terminated, truncated, _ = self._guarded(self.env.step, numpy.stack(actions))
            to_reset = terminated | truncated | (begins == t + 1)  # the ends are of those that wait
        return self._arrays(observations)

    def save(self, folder: Path) -> None:
        """Write the statistics that normalize rewards, if there are any, beside a policy."""
        (folder / REWARD_STATS).unlink(missing_ok=True)  # another model's
        spaces_ = {"observation": self.env.single_observation_space, "action": self.action_space}
        save_spaces(folder, **spaces_, has_masks=self._masks_by_call)
        if self.reward_stats.count:
            (folder / REWARD_STATS).write_text(json.dumps(asdict(self.reward_stats)), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; episodes begin. Raises InputError for a file that is damaged."""
        self.position = None
        if (file := folder / REWARD_STATS).is_file():
            try:
                self.reward_stats = RunningStats(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None

    def close(self) -> None:
        """End the environments and their workers."""
        with self._guard:
            self.env.close()

    def _any_action(self, observations: Any, index: int) -> NDArray[Any]:
        """Some legal action: what a sub-environment that waits for its replay does."""
        if ACTION_MASK not in self.observation_spaces:
            return numpy.asarray(self.action_space.sample())
        mask = self._arrays(observations, numpy.ones(self.num_envs, dtype=numpy.bool_))[ACTION_MASK][index]
        parts = tuple(choices(self.action_space, mask.astype(numpy.int8)))
        return numpy.asarray(self.action_space.sample(parts if self.action_space.shape else parts[0]))

    def _seed_of(self, index: int) -> int:
        # Below 2**31: some environments are written in C.
        return derived_seed(self.seed, f"episodes of copy {index}", int(self.episodes[index])) % 2**31

    def _reset_where(self, ended: Flags) -> Arrays:
        self.episodes += ended
        self.actions = [[] if over else history for history, over in zip(self.actions, ended, strict=True)]
        return self._arrays(self._reset_raw(ended))

    def _reset_raw(self, where: Flags) -> Any:
        seeded = where & self._seeds_next
        seeds = [self._seed_of(i) if is_seeded else None for i, is_seeded in enumerate(seeded)]
        self._seeds_next = self.reseed  # the first call is for all of them
        return self._guarded(self.env.reset, seed=seeds, options={"reset_mask": where.copy()})[0]

    def _final_observations(self, arrays: Arrays, infos: Mapping[str, Any], ended: Flags) -> Arrays:
        final = {name: values.copy() for name, values in arrays.items()}
        given = infos.get("final_obs", infos.get("final_observation"))
        if given is None:
            raise InputError("env: it resets in step without info['final_obs']; use AutoresetMode.NEXT_STEP")
        by_name = flat(given) if isinstance(given, Mapping) else {}
        for i in ended.nonzero()[0]:
            row = {name: values[i] for name, values in by_name.items()} or flat(given[i])
            for name, value in row.items():
                final[name][i] = value
        self.checks.are_finite(final)
        return final

    def _arrays(self, observations: Any, is_over: Flags | None = None) -> Arrays:
        """Observations by name, checked; where `is_over`, nobody acts on them and no action need be legal."""
        # Copied: some environments write each step's into the same memory.
        arrays = {name: numpy.array(values) for name, values in flat(observations).items()}
        if self._masks_by_call:
            arrays[ACTION_MASK] = numpy.stack(self._guarded(self.env.call, "action_masks"))
        self.checks(arrays, is_over)
        return arrays

    def _guarded(self, call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """An environment is the user's code: what it raises is one line with the environment's name."""
        try:
            with self._guard:
                return call(*args, **settings)
        except InputError as error:
            self.position = None  # nobody knows where it stands
            if (cause := error.__cause__) is None:  # our own line, not the guard's
                raise
            # Gymnasium's `close` would wait for the reply that a dead worker owes.
            is_apart = isinstance(env := self.env.unwrapped, gymnasium.vector.AsyncVectorEnv)
            if is_apart:
                for worker in env.processes:
                    worker.kill()
                    worker.join()
                env.closed = True
            with contextlib.suppress(InputError):  # what it raised first is what is wrong
                self.close()
            if is_apart and isinstance(cause, (EOFError, ConnectionError)):
                raise InputError(f"env {self.name} failed: one of its worker processes died") from cause
            raise


def _by_env(infos: Mapping[str, Any], num_envs: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        inner = _by_env(values, num_envs) if isinstance(values, Mapping) else values
        has_it = infos.get(f"_{name}", numpy.ones(num_envs, dtype=bool))
        for i in numpy.flatnonzero(has_it):
            found[i][name] = inner[i]
    return found


def env_name(env: Any) -> str:
    """The id of an environment, or its class."""
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(getattr(env, "unwrapped", env)).__name__


def action_range_notice(space: Any, std: float) -> str:
    """A line if actions of N(0, `std`²), which training begins with, hardly meet the range of a Box."""
    if not isinstance(space, spaces.Box):
        return ""
    normal = NormalDist(0.0, std)
    bounds = zip(space.low.ravel().tolist(), space.high.ravel().tolist(), strict=True)
    for i, (low, high) in enumerate(bounds):
        if low == high:
            continue
        within = normal.cdf(high) - normal.cdf(low)
        reached = max(0.0, (min(high, 3 * std) - max(low, -3 * std)) / (high - low))
        if within < 0.25 or (high - low < UNBOUNDED and reached < 1 / 3):
            met = f"{100 * within:.0f} % of the first lie within and reach {100 * reached:.0f} % of it"
            how = "rescale with gymnasium.wrappers.RescaleAction(env, -1, 1)"
            return f"env: action {i} goes from {low:g} to {high:g}: {met}; {how}"
    return ""

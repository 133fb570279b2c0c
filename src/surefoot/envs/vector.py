"""Gymnasium's vector environments, with their autoreset modes made one and their observations made dictionaries.

Whatever the mode, `step` gives the observations to act on next, the true final observation of an episode that ended, and
which of the steps were real. Environments that we make are reset by us, each episode from a seed of its own: an episode
is repeated exactly by its seed and actions, and that is how a resumed run finds its environments as they were.
"""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from surefoot.core.seeds import derived_seed
from surefoot.errors import InputError

Arrays = dict[str, NDArray[Any]]
OBSERVATION = "obs"  # the name of an observation that has none
ACTION_MASK = "action_mask"


@dataclass
class VectorStep:
    """One step of all copies [N]."""

    observations: Arrays  # to act on next
    rewards: NDArray[numpy.float64]
    terminated: NDArray[numpy.bool_]
    truncated: NDArray[numpy.bool_]
    real: NDArray[numpy.bool_]  # False where the step only reset: nothing was acted on
    final_observations: Arrays | None  # where an episode ended, its last observation; None if none did
    infos: dict[str, Any]


class Vector:
    """A vector environment of any autoreset mode.

    `observation_spaces` are the leaves of one copy's observation space by name, `action_space` one copy's.
    Raises InputError for spaces that cannot be trained on, and, while stepping, for an observation that is not finite or
    an environment that fails.
    """

    def __init__(self, env: Any, *, seed: int, has_masks: bool = False, name: str | None = None):
        self.env, self.seed, self.num_envs = env, seed, env.num_envs
        self.name = name or env_name(env)
        self.mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.observation_spaces = leaves(env.single_observation_space)
        self.action_space = env.single_action_space
        self._masks_by_call = has_masks and ACTION_MASK not in self.observation_spaces
        if self._masks_by_call:
            self.observation_spaces[ACTION_MASK] = spaces.MultiBinary(_mask_width(self.action_space))
        self.episodes = numpy.zeros(self.num_envs, dtype=numpy.int64)  # how many each copy has begun
        self.actions: list[list[Any]] = [[] for _ in range(self.num_envs)]  # of the episodes under way
        self._just_ended = numpy.zeros(self.num_envs, dtype=numpy.bool_)

    @property
    def repeats_itself(self) -> bool:
        """Whether episodes are begun by us from a seed, so that they can be played again."""
        return bool(self.mode == AutoresetMode.DISABLED)

    @property
    def resets_in_a_step_of_its_own(self) -> bool:
        """Whether the step after an episode's last one acts on nothing and only resets."""
        return bool(self.mode == AutoresetMode.NEXT_STEP)

    def reset(self) -> Arrays:
        """Begin an episode in every copy."""
        self.episodes += 1
        self.actions = [[] for _ in range(self.num_envs)]
        self._just_ended[:] = False
        # An environment's own vectorised form takes one number, from which it counts up.
        seeds: Any = [self._seed_of(i) for i in range(self.num_envs)] if self.repeats_itself else self._seed_of(0)
        observations, _ = self._guarded(lambda: self.env.reset(seed=seeds))
        return self._arrays(observations)

    def step(self, actions: NDArray[Any]) -> VectorStep:
        """Act in every copy. `actions` [N, ...] must lie in the action space."""
        if self.repeats_itself:
            for history, action in zip(self.actions, actions, strict=True):
                history.append(action)
        observations, rewards, terminated, truncated, infos = self._guarded(lambda: self.env.step(actions))
        real = ~self._just_ended
        ended = (terminated | truncated) & real
        is_over = numpy.zeros_like(ended) if self.mode == AutoresetMode.SAME_STEP else ended
        arrays, final = self._arrays(observations, is_over), None
        if self.mode == AutoresetMode.NEXT_STEP:
            self._just_ended = ended
            final = arrays if ended.any() else None
        elif ended.any():
            if self.repeats_itself:
                final, arrays = arrays, self._reset_where(ended)
            else:
                final = self._final_observations(arrays, infos, ended)
        rewards = numpy.asarray(rewards, dtype=numpy.float64)
        if not math.isfinite(rewards.sum()) and not numpy.isfinite(rewards[real]).all():
            raise InputError(f"env: the reward of copy {int(numpy.argmin(numpy.isfinite(rewards)))} is not a finite number")
        return VectorStep(arrays, rewards, terminated & real, truncated & real, real, final, infos)

    def state(self) -> dict[str, Any]:
        """Seeds and actions of the episodes under way: JSON, but for arrays."""
        histories = [history[:] for history in self.actions] if self.repeats_itself else None
        return {"episodes": self.episodes.copy(), "actions": histories}

    def restore(self, state: dict[str, Any]) -> Arrays | None:
        """Play the episodes under way again; the observations to act on, or None if they had to begin anew."""
        self.episodes[:] = state["episodes"]
        if state["actions"] is None or not self.repeats_itself:
            return None
        dtype = self.action_space.dtype
        self.actions = [[numpy.asarray(a, dtype=dtype) for a in history] for history in state["actions"]]
        longest = max(map(len, self.actions))
        # All copies end their replay together: one with a short history waits, acting anyhow, until its reset.
        begins = numpy.array([longest - len(history) for history in self.actions])
        observations, _ = self._guarded(lambda: self.env.reset(seed=[self._seed_of(i) for i in range(self.num_envs)]))
        for t in range(longest):
            ready = begins == t
            if t and ready.any():
                observations = self._reset_raw(ready)
            played = [
                history[t - begin] if t >= begin else self._any_action(observations, i)
                for i, (history, begin) in enumerate(zip(self.actions, begins, strict=True))
            ]
            observations, _, terminated, truncated, _ = self._guarded(functools.partial(self.env.step, numpy.stack(played)))
            if (over := (terminated | truncated)).any():  # of one that waits
                observations = self._reset_raw(over)
        if (begins == longest).any() and longest:
            observations = self._reset_raw(begins == longest)
        return self._arrays(observations)

    def close(self) -> None:
        """End the environments and their workers."""
        self.env.close()

    def _end(self) -> None:
        """Close what has failed. Gymnasium's `close` would wait for the answer that a dead worker owes."""
        if not isinstance(self.env, gymnasium.vector.AsyncVectorEnv):
            self.env.close()
            return
        for worker in self.env.processes:
            worker.kill()
            worker.join()
        self.env.closed = True

    def _any_action(self, observations: Any, copy: int) -> NDArray[Any]:
        mask = flat(observations).get(ACTION_MASK)
        legal = None if mask is None or self.action_space.shape else numpy.asarray(mask[copy], dtype=numpy.int8)
        return numpy.asarray(self.action_space.sample(legal))

    def _seed_of(self, copy: int) -> int:
        # Below 2**31: some environments are written in C.
        return derived_seed(self.seed, f"episodes of copy {copy}", int(self.episodes[copy])) % 2**31

    def _reset_where(self, ended: NDArray[numpy.bool_]) -> Arrays:
        for i in ended.nonzero()[0]:
            self.actions[i] = []
            self.episodes[i] += 1
        return self._arrays(self._reset_raw(ended))

    def _reset_raw(self, where: NDArray[numpy.bool_]) -> Any:
        seeds = [self._seed_of(i) if wanted else None for i, wanted in enumerate(where)]
        observations, _ = self._guarded(lambda: self.env.reset(seed=seeds, options={"reset_mask": where.copy()}))
        return observations

    def _final_observations(self, arrays: Arrays, infos: Mapping[str, Any], ended: NDArray[numpy.bool_]) -> Arrays:
        final = {name: values.copy() for name, values in arrays.items()}
        given = infos.get("final_obs", infos.get("final_observation"))
        if given is None:
            raise InputError("env: it resets within the step but gives no info['final_obs']; use AutoresetMode.NEXT_STEP")
        for i in ended.nonzero()[0]:
            for name, value in flat(given[i] if not isinstance(given, dict) else {k: v[i] for k, v in given.items()}).items():
                final[name][i] = value
        return final

    def _arrays(self, observations: Any, is_over: NDArray[numpy.bool_] | None = None) -> Arrays:
        """Observations by name, checked; where `is_over`, nobody acts on them and no action need be legal."""
        # Copied: some environments write each step's into the same memory.
        arrays = {name: numpy.array(values) for name, values in flat(observations).items()}
        if self._masks_by_call:
            arrays[ACTION_MASK] = numpy.stack(self.env.call("action_masks"))  # type: ignore[attr-defined]
        for name, values in arrays.items():
            # The sum first: one number to look at, and where it is finite so are all the others.
            if values.dtype.kind == "f" and not math.isfinite(values.sum()) and not numpy.isfinite(values).all():
                copy = int(numpy.argmin(numpy.isfinite(values.reshape(len(values), -1)).all(1)))
                raise InputError(f"env: the observation {name} of copy {copy} is not finite; mend it in the environment")
            if name == ACTION_MASK:
                can_act = values.reshape(len(values), -1).any(1) | (False if is_over is None else is_over)
                if not can_act.all():
                    copy = int(numpy.argmin(can_act))
                    raise InputError(
                        f"env: copy {copy} has no legal action in its action_mask; an episode that is over must end"
                    )
            elif not _are_counts_within(self.observation_spaces[name], values):
                raise InputError(f"env: the observation {name} lies outside its space {self.observation_spaces[name]}")
        return arrays

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """An environment is the user's code: what it raises is one line with the environment's name."""
        try:
            return call()
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            self._end()
            message = " ".join(str(error).split())[:300]
            raise InputError(f"env {self.name} failed: {type(error).__name__}: {message}") from error


def make_vector(
    make: Callable[[], gymnasium.Env[Any, Any]] | str, *, n_envs: int, vectorization: str, kwargs: Mapping[str, Any], seed: int
) -> Vector:
    """`n_envs` copies of an id or of what a function makes. Raises InputError for an id that does not exist."""
    if vectorization == "native":
        if not isinstance(make, str):
            raise InputError("env.vectorization: native is for Gymnasium ids; use sync or async")
        return Vector(_made(lambda: gymnasium.make_vec(make, n_envs, "vector_entry_point", **kwargs), make), seed=seed)
    name = make if isinstance(make, str) else getattr(make, "__name__", "env")
    maker = functools.partial(gymnasium.make, make, **kwargs) if isinstance(make, str) else functools.partial(make, **kwargs)
    probe = _made(maker, name)  # here, not in a worker: its error is then the user's to read
    has_masks = probe.has_wrapper_attr("action_masks")  # sb3-contrib's way to name the legal actions
    probe.close()
    kind = gymnasium.vector.SyncVectorEnv if vectorization == "sync" else gymnasium.vector.AsyncVectorEnv
    env = _made(lambda: kind([maker] * n_envs, autoreset_mode=AutoresetMode.DISABLED), name)
    return Vector(env, seed=seed, has_masks=has_masks, name=name)


def wrap_vector(env: Any, *, seed: int) -> Vector:
    """A Gymnasium environment or vector environment that the user has made."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        return Vector(env, seed=seed)
    if not isinstance(env, gymnasium.Env):
        raise InputError(f"env: expected a Gymnasium id, environment or vector environment, got {type(env).__name__}")
    copies = gymnasium.vector.SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    return Vector(copies, seed=seed, has_masks=env.has_wrapper_attr("action_masks"), name=env_name(env))


def leaves(space: spaces.Space[Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of an observation space by name, Dict in Dict joined by a dot. Raises InputError for other containers."""
    if isinstance(space, spaces.Dict):
        parts = {f"{prefix}{name}": part for name, part in space.spaces.items()}
        return {name: leaf for key, part in parts.items() for name, leaf in leaves(part, f"{key}.").items()}
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise InputError(
            f"env: the observation space {type(space).__name__} is not supported; Box, Discrete, MultiDiscrete, MultiBinary "
            "and Dict are (gymnasium.wrappers.FlattenObservation makes a Box of most others)"
        )
    return {prefix.removesuffix(".") or OBSERVATION: space}


def flat(observations: Any, prefix: str = "") -> dict[str, Any]:
    """Values as `leaves` names them."""
    if not isinstance(observations, Mapping):
        return {prefix.removesuffix(".") or OBSERVATION: observations}
    return {name: leaf for key, part in observations.items() for name, leaf in flat(part, f"{prefix}{key}.").items()}


def env_name(env: Any) -> str:
    """The id of an environment, or its class."""
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(getattr(env, "unwrapped", env)).__name__


def _made(make: Callable[[], Any], name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there is a newer version, once for each copy
            return make()
    except gymnasium.error.UnregisteredEnv as error:
        module, colon, _ = name.rpartition(":")
        close = difflib.get_close_matches(name, [f"{module}{colon}{known}" for known in gymnasium.registry], n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"env.id: {' '.join(str(error).split()).partition('. Did you mean')[0].rstrip('.')}{hint}") from None
    except (gymnasium.error.Error, ImportError, TypeError, ValueError, OSError) as error:
        raise InputError(f"env {name} cannot be made: {' '.join(str(error).split())[:300]}") from error


def _are_counts_within(space: Any, values: NDArray[Any]) -> bool:
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return True
    first, count = space.start, space.n if isinstance(space, spaces.Discrete) else space.nvec
    return bool(((values >= first) & (values < first + count)).all())


def _mask_width(space: Any) -> int:
    return int(space.n) if isinstance(space, spaces.Discrete) else int(numpy.sum(getattr(space, "nvec", 0)))


def batched(spaces_by_name: Mapping[str, Any], observation: Any) -> tuple[Arrays, bool]:
    """One observation or N of them as arrays [N, ...] by name, and whether it was one.

    Raises InputError for a shape that is neither.
    """
    arrays = {name: numpy.asarray(values) for name, values in flat(observation).items()}
    if missing := sorted(spaces_by_name.keys() - arrays.keys() - {ACTION_MASK}):
        raise InputError(f"predict: the observation lacks {missing[0]!r}")
    name, space = next(iter(spaces_by_name.items()))
    shape, expected = arrays[name].shape, space.shape
    if shape == expected:
        return {name: values[None] for name, values in arrays.items()}, True
    if shape[1:] == expected:
        return arrays, False
    raise InputError(
        f"predict: the observation {name} has shape {list(shape)}; one is {list(expected)}, N are {['N', *expected]}"
    )

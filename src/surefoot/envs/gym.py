"""Gymnasium's vector environments, with their autoreset modes made one and their observations made dictionaries.

Whatever the mode, `step` gives the observations to act on next, the true final observation of an episode that ended, and
which of the steps were real. Environments that we make are reset by us, each episode from a seed of its own: an episode
is repeated exactly by its seed and actions, and that is how a resumed run finds its environments as they were.
"""

from __future__ import annotations

import difflib
import functools
import math
import multiprocessing
import signal
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
from surefoot.envs.observations import Arrays, Checks, choices, flat, leaves, mask_width
from surefoot.errors import InputError
from surefoot.types import ACTION_MASK

# What an id begins with -> the module that registers it, and our extra that brings it.
PROVIDERS = {"ALE/": ("ale_py", "atari")} | {
    f"{name}-": ("highway_env", "driving")
    for name in ("highway", "merge", "parking", "roundabout", "intersection", "racetrack")
}
LONGEST_REPLAY = 20_000  # steps of an episode that are kept so that a resumed run can play it again


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
    no member of a space of counts, for a mask without a legal action, and for an environment that fails. Box values
    beyond their bounds are warned of once: published environments have them.
    """

    def __init__(self, env: Any, *, seed: int, has_masks: bool = False, name: str | None = None):
        self.env, self.seed, self.num_envs = env, seed, env.num_envs
        self.name = name or env_name(env)
        self.mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.observation_spaces = leaves(env.single_observation_space)
        self.action_space = env.single_action_space
        self._masks_by_call = has_masks and ACTION_MASK not in self.observation_spaces
        if self._masks_by_call:
            self.observation_spaces[ACTION_MASK] = spaces.MultiBinary(mask_width(self.action_space))
        self.checks = Checks(self.observation_spaces, self.action_space, name=self.name)
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

    def check_same_spaces(self, other: Vector) -> None:
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
        """Begin an episode in every copy."""
        self.episodes += 1
        self.actions = [[] for _ in range(self.num_envs)]
        self._just_ended[:] = False
        # An environment's own vectorised form takes one number, from which it counts up.
        seeds: Any = (
            [self._seed_of(i) for i in range(self.num_envs)] if self.repeats_itself else self._seed_of(0)
        )
        observations, _ = self._guarded(lambda: self.env.reset(seed=seeds))
        return self._arrays(observations)

    def step(self, actions: NDArray[Any]) -> VectorStep:
        """Act in every copy. `actions` [N, ...] must lie in the action space."""
        if self.repeats_itself:
            for history, action in zip(self.actions, actions, strict=True):
                if len(history) <= LONGEST_REPLAY:
                    history.append(action)
        # A copy: an environment may change what it is given, and these are in the batch and in the history.
        observations, rewards, terminated, truncated, infos = self._guarded(
            lambda: self.env.step(actions.copy())
        )
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
            raise InputError(
                f"env: the reward of copy {int(numpy.argmin(numpy.isfinite(rewards)))} is not a finite number"
            )
        return VectorStep(arrays, rewards, terminated & real, truncated & real, real, final, infos)

    def state(self) -> dict[str, Any]:
        """Seeds and actions of the episodes under way, if they can be played again: JSON, but for arrays."""
        is_kept = self.repeats_itself and max(map(len, self.actions)) <= LONGEST_REPLAY
        histories = [history[:] for history in self.actions] if is_kept else None
        return {"episodes": self.episodes.copy(), "actions": histories}

    def restore(self, state: dict[str, Any]) -> Arrays | None:
        """Play the episodes under way again; the observations to act on, or None if they had to begin anew.

        Raises InputError if the state is that of another number of copies.
        """
        if len(state["episodes"]) != self.num_envs:
            raise InputError(
                f"env: the run has {len(state['episodes'])} copies, the environment given has {self.num_envs}"
            )
        self.episodes[:] = state["episodes"]
        if state["actions"] is None or not self.repeats_itself:
            return None
        dtype = self.action_space.dtype
        self.actions = [[numpy.asarray(a, dtype=dtype) for a in history] for history in state["actions"]]
        longest = max(map(len, self.actions))
        # All copies end their replay together: one with a short history waits, acting anyhow, until its reset.
        begins = numpy.array([longest - len(history) for history in self.actions])
        observations, _ = self._guarded(
            lambda: self.env.reset(seed=[self._seed_of(i) for i in range(self.num_envs)])
        )
        for t in range(longest):
            ready = begins == t
            if t and ready.any():
                observations = self._reset_raw(ready)
            played = [
                history[t - begin] if t >= begin else self._any_action(observations, i)
                for i, (history, begin) in enumerate(zip(self.actions, begins, strict=True))
            ]
            observations, _, terminated, truncated, _ = self._guarded(
                functools.partial(self.env.step, numpy.stack(played))
            )
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
        env = self.env.unwrapped
        if not isinstance(env, gymnasium.vector.AsyncVectorEnv):
            self.env.close()
            return
        for worker in env.processes:
            worker.kill()
            worker.join()
        env.closed = True

    def _any_action(self, observations: Any, copy: int) -> NDArray[Any]:
        """Some legal action: what a copy that waits for its replay does."""
        if ACTION_MASK not in self.observation_spaces:
            return numpy.asarray(self.action_space.sample())
        mask = self._arrays(observations, numpy.ones(self.num_envs, dtype=numpy.bool_))[ACTION_MASK][copy]
        start = getattr(self.action_space, "start", 0)
        chosen = numpy.array([part.argmax() for part in choices(self.action_space, mask)])
        return numpy.asarray(
            (chosen if self.action_space.shape else chosen[0]) + start, dtype=self.action_space.dtype
        )

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
        observations, _ = self._guarded(
            lambda: self.env.reset(seed=seeds, options={"reset_mask": where.copy()})
        )
        return observations

    def _final_observations(
        self, arrays: Arrays, infos: Mapping[str, Any], ended: NDArray[numpy.bool_]
    ) -> Arrays:
        final = {name: values.copy() for name, values in arrays.items()}
        given = infos.get("final_obs", infos.get("final_observation"))
        if given is None:
            raise InputError(
                "env: it resets within the step but gives no info['final_obs']; use AutoresetMode.NEXT_STEP"
            )
        by_name = flat(given) if isinstance(given, Mapping) else None
        for i in ended.nonzero()[0]:
            values = (
                flat(given[i]) if by_name is None else {name: values[i] for name, values in by_name.items()}
            )
            for name, value in values.items():
                final[name][i] = value
        self.checks.are_finite(final)
        return final

    def _arrays(self, observations: Any, is_over: NDArray[numpy.bool_] | None = None) -> Arrays:
        """Observations by name, checked; where `is_over`, nobody acts on them and no action need be legal."""
        # Copied: some environments write each step's into the same memory.
        arrays = {name: numpy.array(values) for name, values in flat(observations).items()}
        if self._masks_by_call:
            arrays[ACTION_MASK] = numpy.stack(self._guarded(lambda: self.env.call("action_masks")))
        self.checks(arrays, is_over)
        return arrays

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """An environment is the user's code: what it raises is one line with the environment's name."""
        try:
            return call()
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            self._end()
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, (EOFError, ConnectionError)):
                message = "one of its worker processes died"
            raise InputError(f"env {self.name} failed: {message}") from error


def make_vector(
    make: Callable[[], gymnasium.Env[Any, Any]] | str,
    *,
    n_envs: int,
    vectorization: str,
    kwargs: Mapping[str, Any],
    seed: int,
) -> Vector:
    """`n_envs` copies of an id or of what a function makes. Raises InputError for an id that does not exist."""
    if vectorization == "native":
        if not isinstance(make, str):
            raise InputError("env.vectorization: native is for Gymnasium ids; use sync or async")
        return Vector(
            _made(lambda: gymnasium.make_vec(make, n_envs, "vector_entry_point", **kwargs), make), seed=seed
        )
    name = make if isinstance(make, str) else getattr(make, "__name__", "env")
    maker = (
        functools.partial(gymnasium.make, make, **kwargs)
        if isinstance(make, str)
        else functools.partial(make, **kwargs)
    )
    probe = _made(maker, name)  # here, not in a worker: its error is then the user's to read
    has_masks = probe.has_wrapper_attr("action_masks")  # sb3-contrib's way to name the legal actions
    probe.close()
    if vectorization == "sync":
        env = _made(
            lambda: gymnasium.vector.SyncVectorEnv([maker] * n_envs, autoreset_mode=AutoresetMode.DISABLED),
            name,
        )
    else:
        makers = [functools.partial(_in_worker, maker)] * n_envs
        env = _made(
            lambda: gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED), name
        )
    return Vector(env, seed=seed, has_masks=has_masks, name=name)


def wrap_vector(env: Any, *, seed: int) -> Vector:
    """A Gymnasium environment or vector environment that the user has made. Raises InputError for anything else."""
    if isinstance(env, Vector):
        return env
    if isinstance(env, gymnasium.vector.VectorEnv):
        return Vector(env, seed=seed, has_masks=_copies_name_masks(env))
    if not isinstance(env, gymnasium.Env):
        raise InputError(
            f"env: expected a Gymnasium id, environment or vector environment, got {type(env).__name__}"
        )
    copies = gymnasium.vector.SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    return Vector(copies, seed=seed, has_masks=env.has_wrapper_attr("action_masks"), name=env_name(env))


def _in_worker(make: Callable[[], Any]) -> Any:
    """Ctrl-C reaches every process of a terminal; the run alone answers it, and ends its workers."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make()


def made_from(vector: Vector) -> tuple[str, dict[str, Any]] | None:
    """The id and keyword arguments that the first copy was made from by `gymnasium.make`, if that is all there was to it."""
    spec = getattr(getattr(vector.env, "envs", [vector.env])[0], "spec", None)
    if spec is None or spec.additional_wrappers or not isinstance(spec.id, str):
        return None
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    own = gymnasium.registry.get(spec.id)
    if own is None or any(
        not isinstance(value, (bool, int, float, str, type(None))) for value in kwargs.values()
    ):
        return None
    if spec.max_episode_steps != own.max_episode_steps:
        kwargs["max_episode_steps"] = spec.max_episode_steps
    return spec.id, kwargs


def share_copies(one: Vector, other: Vector) -> bool:
    """Whether stepping one of them moves the other."""
    mine, others = ({id(copy.unwrapped) for copy in getattr(v.env, "envs", [v.env])} for v in (one, other))
    return not mine.isdisjoint(others)


def env_name(env: Any) -> str:
    """The id of an environment, or its class."""
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(getattr(env, "unwrapped", env)).__name__


def _made(make: Callable[[], Any], name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # that there is a newer version, once for each copy
            return make()
    except gymnasium.error.UnregisteredEnv as error:
        module, colon, _ = name.rpartition(":")
        close = difflib.get_close_matches(
            name, [f"{module}{colon}{known}" for known in gymnasium.registry], n=1, cutoff=0.6
        )
        hint = f"; did you mean {close[0]!r}?" if close else ""
        for prefix, (module, extra) in PROVIDERS.items():
            if name.startswith(prefix):
                hint = f"; write {module}:{name} (pip install 'surefoot[{extra}]')"
        raise InputError(
            f"env.id: {' '.join(str(error).split()).partition('. Did you mean')[0].rstrip('.')}{hint}"
        ) from None
    except ImportError as error:
        extras = [extra for module, extra in PROVIDERS.values() if name.startswith(f"{module}:")]
        hint = f" (pip install 'surefoot[{extras[0]}]')" if extras else ""
        raise InputError(f"env {name} cannot be made{hint}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # what makes an environment is the user's code
        raise InputError(f"env {name} cannot be made: {' '.join(str(error).split())[:300]}") from error


def _copies_name_masks(env: Any) -> bool:
    """Whether the environments in a vector environment have sb3-contrib's `action_masks`."""
    if isinstance(env, gymnasium.vector.SyncVectorEnv):
        return bool(env.envs[0].has_wrapper_attr("action_masks"))
    if isinstance(env, gymnasium.vector.AsyncVectorEnv):
        probe = env.env_fns[0]()
        has_masks = probe.has_wrapper_attr("action_masks")
        probe.close()
        return bool(has_masks)
    return False

"""Environments from an id, from a function, or as the user made them; and one whose frames are shown."""

import difflib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from surefoot.data.user_code import Guard
from surefoot.envs.gym import Vector, env_name
from surefoot.envs.observations import check_sizes
from surefoot.envs.vec_env import FromVecEnv, VecEnv, is_vec_env
from surefoot.errors import InputError
from surefoot.types import OBSERVATION

Frame = NDArray[numpy.uint8]  # [H, W, 3]
Show = Callable[[Frame, float], None]  # gets each frame, and the frames per second
NUMBERS = (float, int, numpy.bool_, numpy.number)
# What an id begins with -> the module that registers it, and our extra that brings it.
PROVIDERS = {"ALE/": ("ale_py", "atari")} | {
    f"{name}-": ("highway_env", "driving")
    for name in ("highway", "merge", "parking", "roundabout", "intersection", "racetrack")
}


def make_vector(
    make: Callable[[], gymnasium.Env[Any, Any]] | str,
    *,
    n_envs: int,
    vectorization: str = "sync",
    kwargs: Mapping[str, Any],
    seed: int | None,
    reseed: bool = True,
) -> Vector:
    """`n_envs` of an id or of what a function makes. Raises InputError for an id that does not exist."""
    name = make if isinstance(make, str) else getattr(make, "__name__", "env")
    if vectorization == "native":
        if not isinstance(make, str):
            raise InputError("env.vectorization: native is for Gymnasium ids; use sync or async")
        native = partial(gymnasium.make_vec, make, n_envs, "vector_entry_point", **kwargs)
        return Vector(_made(name, native), seed=seed, reseed=reseed)
    maker: Any = partial(gymnasium.make, make) if isinstance(make, str) else make
    maker = partial(maker, **kwargs)
    first = _made(name, maker)  # here, not in a worker: its error is then the user's to read
    if not isinstance(first, gymnasium.Env):
        hint = "; for a game of PettingZoo set env.self_play" if hasattr(first, "possible_agents") else ""
        raise InputError(f"env {name}: expected a gymnasium.Env to be made, got {type(first).__name__}{hint}")
    _made(name, first.close)
    kind: Any = gymnasium.vector.SyncVectorEnv
    if vectorization == "async":
        kind = gymnasium.vector.AsyncVectorEnv
    made = partial(_conforming_env, maker)
    env = _made(name, partial(kind, [made] * n_envs, autoreset_mode=AutoresetMode.DISABLED))
    return Vector(env, seed=seed, name=name, reseed=reseed)


def wrap_vector(env: Any, *, seed: int | None, reseed: bool = True) -> Vector:
    """An environment or vector environment that the user has made. Raises InputError for anything else."""
    if isinstance(env, VecEnv):
        return env.vector
    if is_vec_env(env):
        return Vector(FromVecEnv(env), seed=seed if reseed else None, name=type(env).__name__, reseed=False)
    if isinstance(env, Vector):
        return env
    if isinstance(env, gymnasium.vector.VectorEnv):
        return Vector(env, seed=seed, reseed=reseed)
    if not isinstance(env, gymnasium.Env):
        raise InputError(f"env: expected a Gymnasium id or (vector) environment, got {type(env).__name__}")
    kind: Any = partial(gymnasium.vector.SyncVectorEnv, autoreset_mode=AutoresetMode.DISABLED)
    vector = _made(env_name(env), lambda: kind([lambda: Conforming(env)]))
    return Vector(vector, seed=seed, name=env_name(env), reseed=reseed)


def _conforming_env(make: Callable[[], Any]) -> "Conforming":
    """What `make` makes. A worker ignores Ctrl-C and SIGHUP: the run alone handles them, and ends it."""
    if multiprocessing.parent_process() is not None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return Conforming(make())


def _end_with(parent: int) -> None:
    """End this worker soon after its parent: one that was killed cannot end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def made_from(vector: Vector) -> tuple[str, dict[str, Any]] | None:
    """Id and arguments with which `gymnasium.make` alone made the first sub-environment, or None."""
    spec = getattr(_parts(vector)[0], "spec", None)
    registered = gymnasium.registry.get(getattr(spec, "id", ""))
    if spec is None or registered is None or spec.additional_wrappers:
        return None
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    if not all(isinstance(value, (bool, int, float, str, type(None))) for value in kwargs.values()):
        return None
    if spec.max_episode_steps != registered.max_episode_steps:
        kwargs["max_episode_steps"] = spec.max_episode_steps
    return spec.id, kwargs


def share_envs(one: Vector, other: Vector) -> bool:
    """Whether stepping one of them moves the other."""
    mine, others = ({id(env.unwrapped) for env in _parts(vector)} for vector in (one, other))
    return not mine.isdisjoint(others)


def _parts(vector: Vector) -> list[Any]:
    """The sub-environments as the user knows them; of workers' none can be had."""
    parts = getattr(vector.env, "envs", [vector.env])
    return [part.env if isinstance(part, Conforming) else part for part in parts]


class Conforming(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises ValueError for what is not as the spaces say; workers would broadcast and wrap it in silence."""

    def __init__(self, env: Any):
        super().__init__(env)
        check_sizes(env.observation_space, env.action_space)  # before arrays are made for them

    def reset(self, **settings: Any) -> Any:
        """Begin an episode."""
        result = self.env.reset(**settings)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise ValueError("reset() gives the observation and a dict of infos: return observation, {}")
        self._space = self.env.observation_space  # asked for at every step it would cost as much as a step
        return _conforming(result[0], self._space), result[1]

    def step(self, action: Any) -> Any:
        """Act."""
        result = self.env.step(action)
        if len(result) != 5:
            parts = "observation, reward, terminated, truncated and info"
            raise ValueError(f"step() gives {parts}; this one gave {len(result)} values")
        observation, reward, terminated, truncated, info = result
        for value in (reward, terminated, truncated):
            if not isinstance(value, NUMBERS) and getattr(value, "shape", None) != ():
                names = "reward, terminated and truncated are a number each"
                raise ValueError(f"{names}; one is the {type(value).__name__} {value!r:.40}")
        return _conforming(observation, self._space), reward, terminated, truncated, info


def _conforming(value: Any, space: Any, name: str = OBSERVATION) -> Any:
    """An observation with the shapes and types of its space. Raises ValueError for what they do not hold."""
    dtype, shape = space.dtype, space.shape
    if type(value) is numpy.ndarray and value.dtype == dtype and value.shape == shape:
        return value
    if isinstance(space, gymnasium.spaces.Dict):
        if not isinstance(value, Mapping) or not value.keys() >= space.keys():
            has = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"the observation {name} has {has}, its space {sorted(space)}")
        return {key: _conforming(value[key], part, key) for key, part in space.items()}
    array = numpy.asarray(value)
    if array.shape != shape:
        raise ValueError(f"the observation {name} has shape {list(array.shape)}, its space {list(shape)}")
    if array.dtype != dtype and dtype.kind != "f":
        low, high = (0, 1) if dtype.kind == "b" else (numpy.iinfo(dtype).min, numpy.iinfo(dtype).max)
        if array.dtype.kind not in "biu" or array.min() < low or array.max() > high:
            raise ValueError(f"the observation {name} has {array.dtype} values; {dtype} does not hold them")
        array = array.astype(dtype)
    return array


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Hands the frames of the first episode to `show`, its last one included."""

    def __init__(self, env: gymnasium.Env[Any, Any], show: Show):
        super().__init__(env)
        self.show, self.resets = show, 0
        self.frames_per_sec = 0.0  # highway-env sets it
        if hasattr(env.unwrapped, "set_record_video_wrapper"):  # shows what lies between two decisions
            env.unwrapped.set_record_video_wrapper(self)

    def reset(self, **settings: Any) -> Any:
        """Begin an episode."""
        result = self.env.reset(**settings)
        self.resets += 1
        self._capture_frame()
        return result

    def step(self, action: Any) -> Any:
        """Act."""
        result = self.env.step(action)
        self._capture_frame()
        return result

    def _capture_frame(self) -> None:
        if self.resets > 1:
            return
        frame = self.env.render()
        if not isinstance(frame, numpy.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
            raise InputError("its render() gives no frame [H, W, 3]")
        self.show(frame, float(self.env.unwrapped.metadata.get("render_fps", 30)))


def recorded_vector(make: Any, *, kwargs: Mapping[str, Any], seed: int, show: Show) -> Vector:
    """An id, or what a function makes, rendered for `show`. Raises InputError where there are no frames."""

    def made(**settings: Any) -> gymnasium.Env[Any, Any]:
        env = gymnasium.make(make, **settings) if isinstance(make, str) else make(**settings)
        if env.render_mode != "rgb_array":
            raise ValueError("it has no render_mode rgb_array")
        return Recorder(env, show)

    made.__name__ = make if isinstance(make, str) else getattr(make, "__name__", "env")
    return make_vector(made, n_envs=1, kwargs={**kwargs, "render_mode": "rgb_array"}, seed=seed)


def _made(name: str, make: Callable[[], Any]) -> Any:
    try:
        with Guard(f"env {name}", "cannot be made:"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there is a newer version, for each
            return make()
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, gymnasium.error.UnregisteredEnv):
            why = " ".join(str(cause).split()).partition(". Did you mean")[0].rstrip(".")
            raise InputError(f"env.id: {why}{_hint(name)}") from None
        extras = [extra for module, extra in PROVIDERS.values() if name.startswith(f"{module}:")]
        if extras and isinstance(cause, ImportError):
            raise InputError(f"{error} (pip install 'surefoot[{extras[0]}]')") from cause
        if isinstance(cause, (EOFError, ConnectionError)):
            method = multiprocessing.get_start_method()
            why = f"its workers ended at once ({method}: each imports your script)"
            how = "put what the script runs under if __name__ == '__main__', or set env.vectorization: sync"
            raise InputError(f"env {name}: {why}; {how}") from cause
        raise


def _hint(name: str) -> str:
    """What somebody who asked for an unknown id may have meant."""
    for prefix, (module, extra) in PROVIDERS.items():
        if name.startswith(prefix):
            return f"; write {module}:{name} (pip install 'surefoot[{extra}]')"
    module, colon, _ = name.rpartition(":")
    known = [f"{module}{colon}{one}" for one in gymnasium.registry]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

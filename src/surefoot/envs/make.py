"""Environments from an id, from a function, or as the user made them; and one whose frames are shown."""

from __future__ import annotations

import difflib
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from surefoot.envs.gym import Vector, env_name
from surefoot.errors import InputError

Frame = NDArray[numpy.uint8]  # [H, W, 3]
Show = Callable[[Frame, float], None]  # gets each frame, and the frames per second
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
    seed: int,
) -> Vector:
    """`n_envs` of an id or of what a function makes. Raises InputError for an id that does not exist."""
    name = make if isinstance(make, str) else getattr(make, "__name__", "env")
    if vectorization == "native":
        if not isinstance(make, str):
            raise InputError("env.vectorization: native is for Gymnasium ids; use sync or async")
        native = partial(gymnasium.make_vec, make, n_envs, "vector_entry_point", **kwargs)
        return Vector(_made(name, native), seed=seed)
    maker = partial(gymnasium.make, make, **kwargs) if isinstance(make, str) else partial(make, **kwargs)
    _made(name, maker).close()  # here, not in a worker: its error is then the user's to read
    kind: Any = gymnasium.vector.SyncVectorEnv
    if vectorization == "async":
        kind, maker = gymnasium.vector.AsyncVectorEnv, partial(_in_worker, maker)
    env = _made(name, partial(kind, [maker] * n_envs, autoreset_mode=AutoresetMode.DISABLED))
    return Vector(env, seed=seed, name=name)


def wrap_vector(env: Any, *, seed: int) -> Vector:
    """An environment or vector environment that the user has made. Raises InputError for anything else."""
    if isinstance(env, Vector):
        return env
    if isinstance(env, gymnasium.vector.VectorEnv):
        return Vector(env, seed=seed)
    if not isinstance(env, gymnasium.Env):
        raise InputError(f"env: expected a Gymnasium id or (vector) environment, got {type(env).__name__}")
    vector = gymnasium.vector.SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    return Vector(vector, seed=seed, name=env_name(env))


def _in_worker(make: Callable[[], Any]) -> Any:
    """Ctrl-C reaches every process of a terminal; the run alone handles it, and ends its workers."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make()


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
    return getattr(vector.env, "envs", [vector.env])


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there is a newer version, for each
            return make()
    except gymnasium.error.UnregisteredEnv as error:
        why = " ".join(str(error).split()).partition(". Did you mean")[0].rstrip(".")
        raise InputError(f"env.id: {why}{_hint(name)}") from None
    except Exception as error:  # what makes an environment is the user's code
        extras = [extra for module, extra in PROVIDERS.values() if name.startswith(f"{module}:")]
        hint = f" (pip install 'surefoot[{extras[0]}]')" if extras and isinstance(error, ImportError) else ""
        raise InputError(f"env {name} cannot be made{hint}: {' '.join(str(error).split())[:300]}") from error


def _hint(name: str) -> str:
    """What somebody who asked for an unknown id may have meant."""
    for prefix, (module, extra) in PROVIDERS.items():
        if name.startswith(prefix):
            return f"; write {module}:{name} (pip install 'surefoot[{extra}]')"
    module, colon, _ = name.rpartition(":")
    known = [f"{module}{colon}{one}" for one in gymnasium.registry]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

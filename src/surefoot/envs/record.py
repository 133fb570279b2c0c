"""An environment whose frames are shown while episodes run in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy
from numpy.typing import NDArray

from surefoot.envs.gym import Vector, make_vector
from surefoot.errors import InputError

Frame = NDArray[numpy.uint8]  # [H, W, 3]


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Hands the frames of the first episode to `show`, its last one included."""

    def __init__(self, env: gymnasium.Env[Any, Any], show: Callable[[Frame, float], None]):
        super().__init__(env)
        self.show, self.resets = show, 0
        self.frames_per_sec = 0.0  # highway-env sets it
        # highway-env's way to show what lies between two decisions.
        if hasattr(env.unwrapped, "set_record_video_wrapper"):
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


def recorded_vector(
    make: Any, *, kwargs: Mapping[str, Any], seed: int, show: Callable[[Frame, float], None]
) -> Vector:
    """An id, or what a function makes, rendered; `show` gets each frame [H, W, 3] and the frames per second.

    Raises InputError, with the reason, for an environment that gives no frames.
    """

    def made(**settings: Any) -> gymnasium.Env[Any, Any]:
        env = gymnasium.make(make, **settings) if isinstance(make, str) else make(**settings)
        if env.render_mode != "rgb_array":
            raise ValueError("it has no render_mode rgb_array")
        return Recorder(env, show)

    made.__name__ = make if isinstance(make, str) else getattr(make, "__name__", "env")
    return make_vector(made, n_envs=1, kwargs={**kwargs, "render_mode": "rgb_array"}, seed=seed)

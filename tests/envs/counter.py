"""An environment whose every number is known beforehand."""

from typing import Any

import gymnasium
import numpy
from gymnasium import spaces


class Counter(gymnasium.Env):
    """The observation counts steps; leaving state c pays c + 1, or `reward`; `steps` counts every transition made."""

    observation_space = spaces.Box(0.0, 100.0, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 3, end: str = "terminated", reward: float | None = None):
        self.length, self.end, self.reward, self.steps, self.count = length, end, reward, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        assert self.count < self.length, "stepped after its end"
        self.steps += 1
        self.count += 1
        reward = float(self.count) if self.reward is None else self.reward
        terminated, truncated = (self.count == self.length and self.end != other for other in ("truncated", "terminated"))
        return self._observation(), reward, terminated, truncated, {"is_success": True}

    def _observation(self) -> Any:
        return numpy.array([self.count], dtype=numpy.float32)


class Pictures(Counter):
    """The same on a picture of one brightness, which is the count's."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), dtype=numpy.uint8)

    def _observation(self) -> Any:
        return numpy.full((36, 36, 1), 20 * self.count, dtype=numpy.uint8)

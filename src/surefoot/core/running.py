"""Running mean and variance, of numbers and of tensors, that can be saved and merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningStats:
    """Count, mean and sum of squared differences from the mean, of everything seen.

    Merging is Chan, Golub & LeVeque (1979), "Updating formulae ... for computing sample variances", eq. 2.1.
    Example: `RunningStats().updated([1.0, 3.0])` has mean 2 and population variance 1.
    """

    count: int = 0
    mean: float = 0.0
    squared_differences: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 until two different values were seen, so that dividing is safe."""
        std = (self.squared_differences / self.count) ** 0.5 if self.count else 0.0
        # Equal values have a spread too, of rounding errors: dividing by that would blow them up.
        return std if std > 1e-9 * abs(self.mean) else 1.0

    def updated(self, values: Sequence[float]) -> "RunningStats":
        """These stats and `values` together."""
        if not values:
            return self
        n = len(values)
        mean = sum(values) / n
        squares = sum((value - mean) ** 2 for value in values)
        total, delta = self.count + n, mean - self.mean
        return RunningStats(
            count=total,
            mean=self.mean + delta * n / total,
            squared_differences=self.squared_differences + squares + delta**2 * self.count * n / total,
        )


@dataclass
class RunningMoments:
    """Count, mean and population variance of tensors, element by element, in float64.

    Starts from a count of 1e-4 with mean 0 and variance 1, as OpenAI baselines' `RunningMeanStd` does: the
    first batch outweighs it. Example: `update([[1.0], [3.0]])` gives the mean 1.9999 and variance 1.0001.
    """

    count: float
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, shape: Sequence[int]) -> "RunningMoments":
        """Moments of values of one shape."""
        return cls(1e-4, torch.zeros(*shape, dtype=torch.float64), torch.ones(*shape, dtype=torch.float64))

    def update(self, values: Tensor) -> None:
        """Count in a batch [N, ...]; merged as `RunningStats`."""
        values = values.double()
        n, mean = len(values), values.mean(0)
        delta, total = mean - self.mean, self.count + n
        within = self.variance * self.count + ((values - mean) ** 2).sum(0)
        squares = within + delta**2 * (self.count * n / total)
        self.mean, self.variance, self.count = self.mean + delta * (n / total), squares / total, total

    def normalized(self, values: Tensor, *, clip: float) -> Tensor:
        """(values - mean) / std, within ± clip; float32."""
        return ((values - self.mean) * torch.rsqrt(self.variance + 1e-8)).clamp(-clip, clip).float()

    def state(self) -> dict[str, Any]:
        """All of it by name; `update` makes new tensors and leaves these alone."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "RunningMoments":
        """From `state`."""
        mean, variance = (torch.as_tensor(state[name], dtype=torch.float64) for name in ("mean", "variance"))
        return cls(float(state["count"]), mean, variance)

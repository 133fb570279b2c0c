"""Running mean and variance as plain numbers that can be saved and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RunningStats:
    """Count, mean and sum of squared deviations of everything seen.

    Merging is Chan, Golub & LeVeque (1979), "Updating formulae ... for computing sample variances", eq. 2.1.
    Example: `RunningStats().updated([1.0, 3.0])` has mean 2 and population variance 1.
    """

    count: int = 0
    mean: float = 0.0
    squared_deviations: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before two different values were seen, so dividing by it is safe."""
        std = (self.squared_deviations / self.count) ** 0.5 if self.count else 0.0
        # Equal values have a spread too, of rounding errors: dividing by that would blow them up.
        return std if std > 1e-9 * abs(self.mean) else 1.0

    def updated(self, values: Sequence[float]) -> RunningStats:
        """These stats and `values` together."""
        if not values:
            return self
        n = len(values)
        mean = sum(values) / n
        deviations = sum((value - mean) ** 2 for value in values)
        total, delta = self.count + n, mean - self.mean
        return RunningStats(
            count=total,
            mean=self.mean + delta * n / total,
            squared_deviations=self.squared_deviations + deviations + delta**2 * self.count * n / total,
        )

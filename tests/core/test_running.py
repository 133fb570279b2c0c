"""Running mean and standard deviation."""

import random
import statistics

import pytest

from surefoot.core.running import RunningStats


def test_merging_pieces_equals_the_whole() -> None:
    draw = random.Random(0)
    for _ in range(50):
        values = [draw.gauss(3.0, 2.0) for _ in range(draw.randint(2, 60))]
        merged, rest = RunningStats(), values
        while rest:
            size = draw.randint(1, 9)
            merged, rest = merged.updated(rest[:size]), rest[size:]
        assert merged.count == len(values)
        assert merged.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert merged.std == pytest.approx(statistics.pstdev(values), rel=1e-9)


def test_large_mean_does_not_swallow_a_small_spread() -> None:
    """E[x²] - E[x]² would: 1e16 has no room for 1."""
    stats = RunningStats().updated([1e8, 1e8 + 2.0]).updated([1e8, 1e8 + 2.0])
    assert stats.std == pytest.approx(1.0, rel=1e-6)


def test_no_values_change_nothing() -> None:
    stats = RunningStats().updated([1.0, 3.0])
    assert stats.updated([]) == stats
    assert RunningStats().std == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -1.3, 1e6 / 3])
@pytest.mark.parametrize("pieces", [(1,), (3,), (64,), (3, 10, 1), (64, 64, 64)])
def test_equal_values_are_divided_by_one(value: float, pieces: tuple[int, ...]) -> None:
    """The mean of three 0.1 is not 0.1 in floating point: the spread that is left is rounding, not a scale."""
    stats = RunningStats()
    for piece in pieces:
        stats = stats.updated([value] * piece)
    assert stats.std == 1.0

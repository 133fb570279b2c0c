"""Schedules of the learning rate."""

from __future__ import annotations

import pytest

from surefoot.core.schedules import KINDS, schedule


def multipliers(kind: str, total: int, warmup: float = 0.0) -> list[float]:
    return [schedule(kind, step, total, warmup=warmup) for step in range(total)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1.0, 1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])],
)
def test_schedule_starts_at_one_wastes_no_step_and_is_spread_over_what_a_warmup_leaves(
    kind: str, expected: list[float]
) -> None:
    assert multipliers(kind, 4) == pytest.approx(expected, abs=1e-6)
    assert multipliers(kind, 8, warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1.0, *expected], abs=1e-6)


def test_part_of_a_warmup_step_is_a_whole_one() -> None:
    assert multipliers("linear", 4, warmup=0.3) == pytest.approx([0.5, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.34, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_every_update_of_a_run_learns_something(kind: str, warmup: float, total: int) -> None:
    assert all(0.0 < multiplier <= 1.0 for multiplier in multipliers(kind, total, warmup))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_ends_at_zero_and_stays_there(kind: str) -> None:
    assert schedule(kind, 10, 10) == pytest.approx(0.0, abs=1e-12)
    assert schedule(kind, 25, 10) == pytest.approx(0.0, abs=1e-12)


def test_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'exponential'.*constant, linear, cosine"):
        schedule("exponential", 0, 10)

"""Schedules of the learning rate."""

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from surefoot.core.schedules import KINDS, schedule


def multipliers(kind: str, total: int, warmup: float = 0.0) -> list[float]:
    return [schedule(kind, step, total, warmup=warmup) for step in range(total)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1.0, 1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])],
)
def test_schedule_starts_at_one_wastes_no_step_and_is_spread_over_what_a_warmup_leaves(kind: str, expected: Any) -> None:
    assert multipliers(kind, 4) == pytest.approx(expected, abs=1e-6)
    assert multipliers(kind, 8, warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1.0, *expected], abs=1e-6)


def test_part_of_a_warmup_step_is_a_whole_one() -> None:
    assert multipliers("linear", 4, warmup=0.3) == pytest.approx([0.5, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_ends_at_zero_and_stays_there(kind: str) -> None:
    assert schedule(kind, 10, 10) == pytest.approx(0.0, abs=1e-12)
    assert schedule(kind, 25, 10) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_one_update_ahead_of_transformers_and_the_rest_is_the_same(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    rates = [theirs.get_last_lr()[0] for _ in range(10) if optimizer.step() is None and theirs.step() is None]
    assert multipliers(kind, 10, warmup=0.3) == pytest.approx([*rates[:3], 1.0, *rates[3:9]])

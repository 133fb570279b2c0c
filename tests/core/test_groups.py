"""Advantages that compare the completions to one prompt: literals worked by hand, identities, a twin in plain Python."""

import statistics

import pytest
import torch
from torch import Tensor

from surefoot.core.advantages import group_advantages

# Two groups, interleaved: scores 1, 0, 0, 3 with mean 1 and sample variance (0 + 1 + 1 + 4) / 3 = 2, and 5, 7.
SCORES = torch.tensor([1.0, 5.0, 0.0, 0.0, 7.0, 3.0])
GROUPS = torch.tensor([4, 9, 4, 4, 9, 4])
ALL = torch.ones(6, dtype=torch.bool)


def compared(kind: str, scores: Tensor = SCORES, groups: Tensor = GROUPS, acted: Tensor | None = None) -> list[float]:
    acted = torch.ones(len(scores), dtype=torch.bool) if acted is None else acted
    return group_advantages(scores, groups, acted_B=acted, kind=kind).tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dr_grpo", [0.0, -1.0, -1.0, -1.0, 1.0, 2.0]),
        ("grpo", [x / (2**0.5 + 1e-4) for x in (0, -1, -1, -1, 1, 2)]),  # 1e-4 as TRL has it
        ("rloo", [1.0 - 3 / 3, 5.0 - 7.0, 0.0 - 4 / 3, 0.0 - 4 / 3, 7.0 - 5.0, 3.0 - 1 / 3]),
    ],
)
def test_group_advantages_are_the_numbers_worked_by_hand(kind: str, expected: list[float]) -> None:
    assert compared(kind) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_equal_their_twin_and_sum_to_zero_in_each_group(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        groups = torch.arange(24)[torch.randperm(24, generator=generator)] // 4
        scores = torch.randn(24, generator=generator) * 3 + 10
        result = compared(kind, scores, groups)
        for row, (score, group) in enumerate(zip(scores.tolist(), groups.tolist(), strict=True)):
            inside = [s for s, g in zip(scores.tolist(), groups.tolist(), strict=True) if g == group]
            others = [s for i, s in enumerate(scores.tolist()) if groups[i] == group and i != row]
            expected = {
                "dr_grpo": score - statistics.mean(inside),
                "grpo": (score - statistics.mean(inside)) / (statistics.stdev(inside) + 1e-4),
                "rloo": score - statistics.mean(others),
            }[kind]
            assert result[row] == pytest.approx(expected, abs=1e-4)
        for group in range(6):
            assert sum(a for a, g in zip(result, groups.tolist(), strict=True) if g == group) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("score", [0.3, -7.3, 1e6])
def test_equal_scores_give_no_advantage(kind: str, score: float) -> None:
    assert compared(kind, torch.full((6,), score), torch.zeros(6, dtype=torch.long)) == [0.0] * 6


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_rows_in_which_nothing_was_written_enter_no_mean(kind: str) -> None:
    scores, groups = torch.cat([SCORES, torch.tensor([1e6])]), torch.cat([GROUPS, torch.tensor([4])])
    with_empty_row = compared(kind, scores, groups, torch.tensor([True] * 6 + [False]))
    assert with_empty_row == [*compared(kind), 0.0]

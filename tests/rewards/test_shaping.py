"""From what a function gave to what is paid: missing-end penalty, scaling, clipping, in that order."""

from typing import Any

import pytest

from surefoot.config import ShapingConfig
from surefoot.core.running import RunningStats
from surefoot.rewards.shaping import shape_rewards
from surefoot.types import StopReason, Trajectory
from tests.fakes import trajectory


def rows(*scores: float, stop_reason: StopReason = StopReason.END_TOKEN) -> list[Trajectory]:
    return [trajectory(reward=score, stop_reason=stop_reason) for score in scores]


def totals(trajectories: list[Trajectory], *, stats: RunningStats | None = None, **settings: Any) -> list[float]:
    shape_rewards(trajectories, ShapingConfig(**settings), stats or RunningStats())
    return [t.reward_parts["shaped"] for t in trajectories]


def test_the_reward_is_what_is_paid_unless_configured_otherwise() -> None:
    cut_off, stats = rows(0.62, -3.0, stop_reason=StopReason.LENGTH), RunningStats().updated([1.0, 2.0])
    assert shape_rewards(cut_off, ShapingConfig(), stats) == stats
    assert [t.reward_parts for t in cut_off] == [{"shaped": 0.62}, {"shaped": -3.0}]


def test_missing_end_is_subtracted_from_the_score() -> None:
    cut_off = rows(0.5, -3.0, stop_reason=StopReason.LENGTH)
    assert totals(cut_off, missing_eos_penalty=1.0) == [-0.5, -4.0]
    assert [t.reward for t in cut_off] == [0.5, -3.0]  # what the function gave is kept
    assert [t.reward_parts["missing_eos_penalty"] for t in cut_off] == [-1.0, -1.0]
    assert totals(cut_off, missing_eos_penalty=0.0) == [0.5, -3.0]
    for stop_reason in (StopReason.END_TOKEN, StopReason.STOP_STRING):
        ended = rows(0.5, stop_reason=stop_reason)
        assert totals(ended, missing_eos_penalty=1.0) == [0.5] and "missing_eos_penalty" not in ended[0].reward_parts


def test_scaling_divides_by_the_running_std_and_keeps_the_mean_where_it_is() -> None:
    batch = rows(1.0, 3.0, 5.0)
    stats = shape_rewards(batch, ShapingConfig(scale="running_std"), RunningStats())
    assert [t.reward_parts["shaped"] for t in batch] == pytest.approx([x / (8 / 3) ** 0.5 for x in (1, 3, 5)])
    assert (stats.count, stats.mean) == (3, 3.0)
    later = rows(3.0, 3.0, 3.0)
    assert shape_rewards(later, ShapingConfig(scale="running_std"), stats).count == 6
    assert later[0].reward_parts["shaped"] == pytest.approx(3.0 / (8 / 6) ** 0.5)


@pytest.mark.parametrize("scores", [[0.1], [0.1, 0.1, 0.1], [0.0, 0.0], [-0.7] * 10])
def test_scaling_equal_scores_leaves_them_alone_and_clipping_bounds_both_sides(scores: list[float]) -> None:
    assert totals(rows(*scores), scale="running_std") == scores
    assert totals(rows(-7.0, *scores, 7.0), clip=1.0) == [-1.0, *scores, 1.0]


def test_penalty_comes_before_scaling_and_scaling_before_clipping() -> None:
    batch = [*rows(2.0), *rows(4.0, stop_reason=StopReason.LENGTH)]
    # 2 and 4 - 8 = -4: mean -1, std 3; then 2/3 and -4/3, the latter clipped.
    settings = {"missing_eos_penalty": 8.0, "scale": "running_std", "clip": 1.0}
    assert totals(batch, **settings) == pytest.approx([2 / 3, -1.0])

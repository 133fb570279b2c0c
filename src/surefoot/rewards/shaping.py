"""From the score a reward function gave to the reward the policy gets: missing-end penalty, scaling, clipping."""

from __future__ import annotations

from collections.abc import Sequence

from surefoot.config import ShapingConfig
from surefoot.core.running import RunningStats
from surefoot.types import Trajectory


def shape_rewards(
    trajectories: Sequence[Trajectory], config: ShapingConfig, stats: RunningStats
) -> RunningStats:
    """Fill up `reward_parts` of every trajectory; `reward_parts["total"]` is what goes on its last written token.

    In this order: the penalty for an answer cut off by the length limit is subtracted; the result is divided by the running standard deviation of all scores so
    far, this batch included; then clipped. Returns the stats with this batch in them.
    """
    for t in trajectories:
        missing_end = not t.completion.stop_reason.ended_by_itself
        penalty = config.missing_eos_penalty if missing_end else None
        t.reward_parts |= {"score": t.score, "total": t.score}
        if penalty is not None:
            t.reward_parts["missing_eos_penalty"] = -penalty
            t.reward_parts["total"] = t.score - penalty
    if config.scale == "running_std":
        stats = stats.updated([t.reward_parts["total"] for t in trajectories])
        for t in trajectories:
            t.reward_parts["total"] /= stats.std
    if config.clip is not None:
        for t in trajectories:
            t.reward_parts["total"] = min(max(t.reward_parts["total"], -config.clip), config.clip)
    return stats

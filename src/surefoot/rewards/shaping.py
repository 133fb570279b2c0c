"""From what a reward function gave to what the policy is paid: missing-end penalty, scaling, clipping."""

from collections.abc import Sequence

from surefoot.config import ShapingConfig
from surefoot.core.running import RunningStats
from surefoot.types import Trajectory


def shape_rewards(
    trajectories: Sequence[Trajectory], config: ShapingConfig, stats: RunningStats
) -> RunningStats:
    """Fill up `reward_parts` of every trajectory; `reward_parts["shaped"]` is what its last turn is paid.

    In this order: the penalty for a completion cut off by the length limit; division by the running std of
    all rewards so far; clipping. One without a reward is paid nothing. Returns the stats with this batch.
    """
    trajectories = [t for t in trajectories if t.is_rewarded]
    for t in trajectories:
        shaped = t.reward
        if config.missing_eos_penalty is not None and not t.stop_reason.ended_by_itself:
            t.reward_parts["missing_eos_penalty"] = -config.missing_eos_penalty
            shaped -= config.missing_eos_penalty
        t.reward_parts["shaped"] = shaped
    if config.scale == "running_std":
        stats = stats.updated([t.reward_parts["shaped"] for t in trajectories])
        for t in trajectories:
            t.reward_parts["shaped"] /= stats.std
    if config.clip is not None:
        for t in trajectories:
            t.reward_parts["shaped"] = min(max(t.reward_parts["shaped"], -config.clip), config.clip)
    return stats

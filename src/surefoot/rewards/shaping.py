"""From what a reward function gave to what the policy is paid: missing-end penalty, scaling, clipping."""

import math
from collections.abc import Sequence

from surefoot.config import ShapingConfig
from surefoot.core.running import RunningStats
from surefoot.types import Trajectory


def shape_rewards(played: Sequence[Trajectory], config: ShapingConfig, stats: RunningStats) -> RunningStats:
    """Fill up `reward_parts` of every trajectory; `reward_parts["shaped"]` is what its last turn is paid.

    In this order: the penalty for a completion cut off by the length limit; division by the running std of
    all rewards so far; clipping. One without a reward is paid nothing. Returns the stats with this batch.
    """
    penalty, clip = config.missing_eos_penalty, math.inf if config.clip is None else config.clip
    rewarded = [t for t in played if t.is_rewarded]
    for t in rewarded:
        shaped = t.reward
        if penalty is not None and not t.stop_reason.ended_by_itself:
            t.reward_parts["missing_eos_penalty"] = -penalty
            shaped -= penalty
        t.reward_parts["shaped"] = shaped
    if config.scale == "running_std":
        stats = stats.updated([t.reward_parts["shaped"] for t in rewarded])
    for t in rewarded:
        scaled = t.reward_parts["shaped"] / (stats.std if config.scale == "running_std" else 1.0)
        t.reward_parts["shaped"] = min(max(scaled, -clip), clip)
    return stats

"""Rewards that are added up: each part is checked, weighted and kept by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surefoot.config import check_weights
from surefoot.errors import InputError
from surefoot.rewards.functions import RewardFunction, compute_rewards
from surefoot.types import Trajectory

PART = "part/"  # before a part's label in `reward_parts`


class MixedReward:
    """A weighted sum of reward functions: `MixedReward({"polite": (polite, 1.0), "long": (length, -0.01)})`.

    Raises InputError for what is not a function with a weight, for weights that are not finite or all 0, and
    for a label that cannot name a metric.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]]):
        for label, part in parts.items():
            is_pair = (
                isinstance(label, str)
                and isinstance(part, (tuple, list))
                and len(part) == 2
                and callable(part[0])
            )
            if not is_pair or isinstance(part[1], bool) or not isinstance(part[1], (int, float)):
                found = f"{label!r:.60}: {part!r:.60}"
                raise InputError(f"reward: expected a label with a function and its weight, got {found}")
        try:
            check_weights({label: weight for label, (_, weight) in parts.items()})
        except ValueError as error:
            raise InputError(f"reward: {error}") from None
        self.parts = dict(parts)


def assign_rewards(reward: RewardFunction | MixedReward, trajectories: Sequence[Trajectory]) -> None:
    """Fill `reward` and `reward_parts` of every trajectory: `reward`, and of a mixed one what each part gave,
    unweighted.

    Raises InputError as `compute_rewards` does, naming the part, and for a sum that is not finite.
    """
    mixed = reward.parts if isinstance(reward, MixedReward) else {}
    given = {
        label: compute_rewards(function, trajectories, name=f"reward {label}")
        for label, (function, _) in mixed.items()
    }
    if isinstance(reward, MixedReward):
        totals = [
            math.fsum(mixed[label][1] * given[label][i] for label in mixed) for i in range(len(trajectories))
        ]
    else:
        totals = compute_rewards(reward, trajectories)
    for i, (t, total) in enumerate(zip(trajectories, totals, strict=True)):
        if not math.isfinite(total):
            raise InputError(
                f"the parts of the reward add up to {total} for sample {i}; make their weights smaller"
            )
        t.reward = total
        t.reward_parts = {"reward": total} | {PART + label: values[i] for label, values in given.items()}

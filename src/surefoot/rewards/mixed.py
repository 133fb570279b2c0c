"""Rewards that are added up: each part is checked, weighted and kept by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surefoot.config import check_weights
from surefoot.errors import InputError
from surefoot.rewards.functions import LARGEST_REWARD, RewardFunction, compute_rewards
from surefoot.types import Trajectory

PART = "part/"  # before a part's label in `reward_parts`


class MixedReward:
    """A weighted sum of reward functions: `MixedReward({"polite": (polite, 1.0), "long": (length, -0.01)})`.

    Raises InputError for what is not a function with a weight, for weights that are not finite or all 0, and
    for a label that cannot name a metric.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]]):
        for label, part in parts.items():
            is_pair = isinstance(label, str) and isinstance(part, (tuple, list)) and len(part) == 2
            is_number = is_pair and isinstance(part[1], (int, float)) and not isinstance(part[1], bool)
            if not is_number or not callable(part[0]):
                found = f"{label!r:.60}: {part!r:.60}"
                raise InputError(f"reward: expected a label with a function and its weight, got {found}")
        try:
            check_weights({label: weight for label, (_, weight) in parts.items()})
        except ValueError as error:
            raise InputError(f"reward: {error}") from None
        self.parts = dict(parts)


def assign_rewards(reward: RewardFunction | MixedReward, trajectories: Sequence[Trajectory]) -> None:
    """Fill `reward` and `reward_parts` of every trajectory; of a mixed one with each part, unweighted.

    Raises InputError as `compute_rewards` does, naming the part, and for a sum that is not finite.
    """
    if not isinstance(reward, MixedReward):
        for t, value in zip(trajectories, compute_rewards(reward, trajectories), strict=True):
            t.reward, t.reward_parts = value, {"reward": value}
        return
    parts = {
        label: compute_rewards(function, trajectories, name=f"reward {label}")
        for label, (function, _) in reward.parts.items()
    }
    for i, t in enumerate(trajectories):
        t.reward = math.fsum(reward.parts[label][1] * values[i] for label, values in parts.items())
        if not abs(t.reward) <= LARGEST_REWARD:
            found = f"the parts of the reward add up to {t.reward} for sample {i}"
            raise InputError(f"{found}; make their weights smaller")
        t.reward_parts = {"reward": t.reward} | {PART + label: values[i] for label, values in parts.items()}

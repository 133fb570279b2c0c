"""Rewards that are added up: each part is checked, weighted and kept by its name."""

import math
from collections.abc import Mapping, Sequence

from surefoot.config import check_weights
from surefoot.errors import InputError
from surefoot.rewards.functions import LARGEST_REWARD, RewardFunction, RewardLog, compute_several
from surefoot.types import Trajectory

PART = "part/"  # before a part's label in `reward_parts`


class MixedReward:
    """A weighted sum of reward functions: `MixedReward({"polite": (polite, 1.0), "long": (length, -0.01)})`.

    A list of functions is their sum, each called by its name.
    Raises InputError for what is not a function with a weight, for weights that are not finite or all 0, and
    for a label that cannot name a metric.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]] | Sequence[RewardFunction]):
        if not isinstance(parts, Mapping):
            names = [getattr(function, "__name__", type(function).__name__) for function in parts]
            if len({*names}) < len(names):
                what = "two functions of one name; give a dict, {label: (function, weight)}"
                raise InputError(f"reward: {what}")
            parts = {name: (function, 1.0) for name, function in zip(names, parts, strict=True)}
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


def assign_rewards(
    reward: RewardFunction | MixedReward, trajectories: Sequence[Trajectory], log: RewardLog | None = None
) -> None:
    """Fill `reward` and `reward_parts` of every trajectory; of a mixed one with each part, unweighted.

    A part that is None for a sample is left out of its sum; without any part the reward is NaN. Raises
    InputError as `compute_rewards` does, naming the part, and for a sum that is not finite.
    """
    weights = {"": 1.0}
    functions: dict[str, RewardFunction]
    if isinstance(reward, MixedReward):
        functions = {f"reward {label}": function for label, (function, _) in reward.parts.items()}
        weights = {label: weight for label, (_, weight) in reward.parts.items()}
    else:
        functions = {"reward": reward}
    scores = compute_several(functions, trajectories, log or RewardLog()).values()
    for i, (t, *given) in enumerate(zip(trajectories, *scores, strict=True)):
        parts = {label: value for label, value in zip(weights, given, strict=True) if not math.isnan(value)}
        t.reward = math.fsum(weights[label] * value for label, value in parts.items()) if parts else math.nan
        if abs(t.reward) > LARGEST_REWARD:
            found = f"the parts of the reward add up to {t.reward} for sample {i}"
            raise InputError(f"{found}; make their weights smaller")
        t.reward_parts = {"reward": t.reward} | {PART + label: v for label, v in parts.items() if label}

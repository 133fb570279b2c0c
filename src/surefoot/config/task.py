"""The section of a text task: its prompts, and its reward or the parts that it is added up from."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from surefoot.config.fields import FilePath, HeldOut, Positive, RewardPath, Section, setting
from surefoot.config.messages import short, validated
from surefoot.errors import InputError

LABEL = r"[A-Za-z0-9_.-]{1,64}"  # what names a metric


class RewardPart(Section):
    """One of several rewards that are added up."""

    name: RewardPath = Field(description="Reward function, or a reward model's folder.")
    weight: float = setting(1.0, "Its weight in the sum; below 0 it is a cost, with 0 it is only logged.")
    label: str | None = setting(None, "Its name in metrics; `null`: the function's, or the folder's own.")

    @property
    def called(self) -> str:
        """Its name in metrics and samples."""
        return Path(self.name.rpartition(":")[2]).name if self.label is None else self.label


class TaskConfig(Section):
    """The prompts and the reward."""

    prompts: FilePath = Field(description="JSONL file of prompts, or a name `surefoot fetch` knows.")
    reward: RewardPath | list[RewardPart] = Field(
        description="`file.py:function`, `package.module:function`, a reward model's folder, or a list "
        "of `{name, weight, label}`, which are added up (docs/extending.md)."
    )
    metric: RewardPath | None = setting(None, "Like a reward; chooses the best checkpoint; `null`: reward.")
    prompt_column: str = setting("prompt", "Column with the prompt; the reward gets the others.")
    chat: bool = setting(False, "Render text with the chat template, as lists of messages always are.")
    prompt_tokens: Positive | None = setting(None, "Keep only the first N tokens of each prompt.")
    held_out: HeldOut = 0.1

    @field_validator("reward", mode="before")
    @classmethod
    def _each_part(cls, reward: Any) -> Any:
        if not isinstance(reward, list):
            return reward
        parts = [_part(part, number) for number, part in enumerate(reward, start=1)]
        labels = [part.called for part in parts]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two parts are called {twice!r}; give each a different label")
        check_weights(dict(zip(labels, (part.weight for part in parts), strict=True)))
        return parts


def _part(part: Any, number: int) -> RewardPart:
    """A part of a reward, from what was written. Its problems are said as its own."""
    if isinstance(part, RewardPart):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"part {number} is {short(part)}; write {{name: …, weight: 1.0}}")
    try:
        return validated(RewardPart, part, where=f"part {number}")
    except InputError as error:
        raise ValueError(error) from None


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError: weights of a reward's parts, by label, that make no reward, or unusable labels."""
    for label, weight in weights.items():
        if not re.fullmatch(LABEL, label):
            raise ValueError(f"{short(label)} cannot name a metric; use letters, digits, '.', '_' and '-'")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {label} is {weight}; give a finite number")
    if not any(weights.values()):
        raise ValueError("no part has a weight other than 0; give one, or there is nothing to learn")

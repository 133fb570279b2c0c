"""What sections are made of: a strict model, kinds of values, texts that may be paths, shared fields."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from surefoot.config.messages import short


class Section(BaseModel):
    """A strict part of the configuration: unknown keys are errors, nothing is coerced, nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field: its default, its documentation in a sentence or two, and pydantic's limits."""
    return Field(default, description=meaning, **limits)


Positive = Annotated[int, Field(gt=0, le=10**9)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]


# --- texts that may be paths, which in a file are relative to it: the type says when they are ---


@dataclass(frozen=True)
class IsPath:
    """Tells a local path from another name: `test(text, folder)`, the folder being that of its file."""

    test: Callable[[str, Path], bool]


def _usable_path(text: str) -> str:
    if not text or "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"{short(text)} is not a name of a file or folder")
    return os.path.expanduser(text)


def _is_there(text: str, folder: Path) -> bool:
    return text.startswith(".") or os.path.exists(folder / text)


PathText = Annotated[str, AfterValidator(_usable_path)]
# Always a path.
FolderPath = Annotated[PathText, IsPath(lambda text, folder: True)]
# A model's folder, or the name of an asset or of a hub's model.
ModelPath = Annotated[PathText, IsPath(_is_there)]
# A file of rows, or an asset's name. A file that is not there yet must not be found elsewhere by accident.
FilePath = Annotated[
    PathText, IsPath(lambda text, folder: "/" in text or ".json" in text or _is_there(text, folder))
]
# `file.py:function`, or a name that is imported.
FunctionName = Annotated[str, IsPath(lambda text, folder: ".py:" in text)]
# A function, or a reward model's folder.
RewardPath = Annotated[PathText, IsPath(lambda text, folder: ".py:" in text or os.path.isdir(folder / text))]

# --- rows of files, and examples to learn from, of `sft` and `ptx` ---

HeldOut = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of rows held out for evaluation, by a hash of the prompt (a demonstration's: "
        "of all its text); above 0 at least one row where there are others (docs/sft.md#what-is-held-out).",
    ),
]
ExamplesFile = Annotated[
    FilePath | None,
    Field(
        description="JSONL file of `{text}`, `{prompt, completion}` or `{messages}` rows, one kind per file, "
        "or a name `surefoot fetch` knows; `null`: rows given in Python."
    ),
]
ExamplesColumns = Annotated[
    dict[Literal["text", "prompt", "completion", "messages"], str],
    Field(description="The file's names of these columns, where they differ: `{prompt: question}`."),
]
ExamplesMaxTokens = Annotated[
    Positive | None,
    Field(
        description="Longer examples are truncated to this many tokens, and counted; "
        "`null`: one longer than the model's context is refused."
    ),
]

# --- optimizer steps, of `ppo`, `sft` and `reward_model` ---

LearningRate = Annotated[
    float,
    Field(gt=0, description="Adam's peak learning rate; full fine-tuning needs a smaller one than LoRA."),
]
LearningRateSchedule = Annotated[Schedule, Field(description="Learning rate schedule over the run.")]
LearningRateWarmup = Annotated[
    Fraction, Field(description="Fraction of the run in which the learning rate rises from 0.")
]
AdamEpsilon = Annotated[float, Field(gt=0, description="Adam's epsilon.")]
MaxGradNorm = Annotated[float, Field(gt=0, description="The global gradient norm is clipped to this.")]
MicroBatchTokens = Annotated[
    Positive,
    Field(
        description="Most tokens (rows × longest row) in one forward and backward pass. "
        "Speed and memory only: the gradient is the minibatch's."
    ),
]
MaxBadSteps = Annotated[
    Positive,
    Field(description="Skipped steps (non-finite loss or gradient) in a row before the run stops."),
]

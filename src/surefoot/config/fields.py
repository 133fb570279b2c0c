"""The kinds of values that fields hold, and the fields that several sections have: written once, documentation and all."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from surefoot.config.messages import short


def _usable_path(text: str) -> str:
    if not text or "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"{short(text)} is no name of a file or folder")
    return os.path.expanduser(text)


Positive = Annotated[int, Field(gt=0, le=10**9)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(_usable_path)]

# Examples to imitate.
ExamplesFile = Annotated[
    PathText | None,
    Field(
        description="JSONL file of `{text}`, `{prompt, completion}` or `{messages}` rows, one kind a file, or a name `surefoot fetch` knows; `null`: rows given in Python."
    ),
]
ExamplesColumns = Annotated[
    dict[Literal["text", "prompt", "completion", "messages"], str],
    Field(description="What the file calls these columns, where it has other names: `{prompt: question}`."),
]
HeldOut = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Fraction of rows kept for evaluation, by a hash of the prompt (a demonstration's: of all its text); above 0 at least one row where there are others (docs/sft.md#what-is-held-out).",
    ),
]
ExamplesMaxTokens = Annotated[
    Positive | None,
    Field(
        description="Longer examples are cut to so many tokens, and counted; `null`: one longer than the model's context is refused."
    ),
]

# Optimiser steps.
LearningRate = Annotated[
    float,
    Field(
        gt=0, description="Adam's step size at its highest; all weights of a model want less than an adapter."
    ),
]
Schedule = Literal["constant", "linear", "cosine"]
LearningRateSchedule = Annotated[Schedule, Field(description="How the learning rate moves over the run.")]
LearningRateWarmup = Annotated[
    Fraction, Field(description="Fraction of the run in which the learning rate climbs from 0.")
]
AdamEpsilon = Annotated[float, Field(gt=0, description="Adam's epsilon.")]
MaxGradNorm = Annotated[float, Field(gt=0, description="Global gradient norm is clipped to this.")]
MicroBatchTokens = Annotated[
    Positive,
    Field(
        description="Most tokens (rows × longest row) in one forward and backward pass, rows of like length together. Speed and memory only: the gradient is the minibatch's."
    ),
]
MaxBadSteps = Annotated[
    Positive, Field(description="Skipped steps (non-finite loss or gradient) in a row before the run stops.")
]

"""The sections of supervised runs: fine-tuning on examples, a new model to teach, and reward models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from surefoot.config.fields import (
    AdamEpsilon,
    ExamplesColumns,
    ExamplesFile,
    ExamplesMaxTokens,
    HeldOut,
    LearningRate,
    LearningRateSchedule,
    LearningRateWarmup,
    MaxBadSteps,
    MaxGradNorm,
    MicroBatchTokens,
    NonNegative,
    PathText,
    Positive,
)
from surefoot.config.sections import Section

MAX_WEIGHTS = 1_000_000_000  # of a new model: 4 GB in float32


class SFTConfig(Section):
    """Supervised fine-tuning on examples, in place of a task: what others wrote is made likelier."""

    data: ExamplesFile = None
    columns: ExamplesColumns = Field(default_factory=dict)
    held_out: HeldOut = 0.1
    max_tokens: ExamplesMaxTokens = None
    epochs: Positive = Field(3, description="Passes over the examples; rounded up to whole updates.")
    batch_size: Positive = Field(16, description="Examples in one optimiser step.")
    learning_rate: LearningRate = 2e-4
    lr_schedule: LearningRateSchedule = "cosine"
    lr_warmup: LearningRateWarmup = 0.05
    adam_epsilon: AdamEpsilon = 1e-8
    max_grad_norm: MaxGradNorm = 1.0
    micro_batch_tokens: MicroBatchTokens = 2048
    max_bad_steps: MaxBadSteps = 5



class NewModelConfig(Section):
    """The untaught model that `surefoot new-model` makes for `sft` in the folder `policy.model`, from the examples' text and the seed; at most a billion weights."""

    kind: Literal["transformer", "lstm"] = Field(
        "transformer",
        description="`transformer`: transformers' Llama, heads of 32 numbers, two and a half times the width inside; `lstm`: embedding, LSTM, output layer.",
    )
    vocab: Positive = Field(
        2048,
        description="Most tokens: 256 bytes, an end token (and three roles for chats), the rest pieces of the text that stand often (BPE); 257 reads bytes alone.",
    )
    width: Positive = Field(128, description="Numbers in a hidden state; of a transformer a multiple of 32.")
    layers: int = Field(2, ge=1, le=128, description="Layers one above the other.")

    @model_validator(mode="after")
    def _can_be_made(self) -> NewModelConfig:
        if self.vocab < 257:
            raise ValueError(
                f"vocab is {self.vocab}; 256 bytes and an end token need 257, and more learn pieces of the text"
            )
        if self.kind == "transformer" and self.width % 32:
            raise ValueError(f"width is {self.width}; a transformer's heads take a multiple of 32")
        # Embedding and output layer; 11.5 width² in a layer of a transformer, 8 in an LSTM's.
        weights = 2 * self.vocab * self.width + 12 * self.layers * self.width**2
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"width {self.width}, layers {self.layers} and vocab {self.vocab} make some {weights:.1e} weights; "
                f"at most {MAX_WEIGHTS:.0e} are made here, so give smaller sizes"
            )
        return self


class RewardModelConfig(Section):
    """A reward model from people's preferences, in place of a task: a score for whole texts."""

    data: PathText | None = Field(
        None,
        description="JSONL file of pairs, `{prompt, chosen, rejected, margin}`, or of ratings, `{prompt, text, rating}` (prompt and margin may be missing), one kind a file; `null`: rows given in Python.",
    )
    held_out: HeldOut = 0.1
    rating_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Lowest and highest rating there may be, `[-4, 4]`: one outside is refused."
    )
    center: NonNegative = Field(
        0.0,
        description="Weight of (r_chosen + r_rejected)², which holds the scores of pairs near 0; 0.01 is usual.",
    )
    epochs: Positive = Field(2, description="Passes over the preferences; rounded up to whole updates.")
    batch_size: Positive = Field(32, description="PreferenceDataset in one optimiser step.")
    learning_rate: LearningRate = 2e-4
    lr_schedule: LearningRateSchedule = "cosine"
    lr_warmup: LearningRateWarmup = 0.05
    adam_epsilon: AdamEpsilon = 1e-8
    max_grad_norm: MaxGradNorm = 1.0
    micro_batch_tokens: Positive = Field(
        2048,
        description="Most tokens (texts × longest text) in one forward and backward pass. Speed and memory only.",
    )
    max_bad_steps: MaxBadSteps = 5

    @field_validator("rating_range")
    @classmethod
    def _ordered(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(f"{ends} is no range; write the lowest rating first, then the highest")
        return ends

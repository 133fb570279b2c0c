"""Learning from examples and preferences: the sections `sft`, `ptx`, `reward_model` and `new_model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from surefoot.config import fields as f
from surefoot.config.fields import Section, setting

MAX_WEIGHTS = 1_000_000_000  # of a new model: 4 GB in float32


class SFTConfig(Section):
    """Supervised fine-tuning on examples, in place of a task: cross-entropy on target completions."""

    data: f.ExamplesFile = None
    columns: f.ExamplesColumns = Field(default_factory=dict)
    held_out: f.HeldOut = 0.1
    max_tokens: f.ExamplesMaxTokens = None
    epochs: f.Positive = setting(3, "Passes over the examples; rounded up to whole updates.")
    batch_size: f.Positive = setting(16, "Examples in one optimizer step.")
    learning_rate: f.LearningRate = 2e-4
    lr_schedule: f.LearningRateSchedule = "cosine"
    lr_warmup: f.LearningRateWarmup = 0.05
    adam_epsilon: f.AdamEpsilon = 1e-8
    max_grad_norm: f.MaxGradNorm = 1.0
    micro_batch_tokens: f.MicroBatchTokens = 2048
    max_bad_steps: f.MaxBadSteps = 5


class PTXConfig(Section):
    """Demonstrations whose NLL is added to PPO's loss (PPO-ptx; Ouyang et al. 2022, arXiv:2203.02155)."""

    data: f.ExamplesFile = None
    columns: f.ExamplesColumns = Field(default_factory=dict)
    held_out: f.HeldOut = 0.1
    max_tokens: f.ExamplesMaxTokens = None
    batch_size: f.Positive = setting(16, "Demonstrations added to each minibatch; fewer if there are fewer.")
    coef: f.NonNegative = setting(0.5, "Weight of their mean NLL per token; 0: they are only evaluated.")
    schedule: f.Schedule = setting("constant", "Schedule of coef over the run.")


class RewardModelConfig(Section):
    """A reward model from people's preferences, in place of a task: a score for whole texts."""

    data: f.FilePath | None = setting(
        None,
        "JSONL file of pairs, `{prompt, chosen, rejected, margin}`, or ratings, `{prompt, text, rating}`, "
        "one kind per file; prompt and margin are optional; `null`: rows given in Python.",
    )
    held_out: f.HeldOut = 0.1
    rating_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = setting(
        None, "Lowest and highest allowed rating, `[-4, 4]`: one outside is refused."
    )
    center: f.NonNegative = setting(
        0.0, "Weight of (r_chosen + r_rejected)², which holds the scores of pairs near 0; 0.01 is usual."
    )
    epochs: f.Positive = setting(2, "Passes over the preferences; rounded up to whole updates.")
    batch_size: f.Positive = setting(32, "Preferences in one optimizer step.")
    learning_rate: f.LearningRate = 2e-4
    lr_schedule: f.LearningRateSchedule = "cosine"
    lr_warmup: f.LearningRateWarmup = 0.05
    adam_epsilon: f.AdamEpsilon = 1e-8
    max_grad_norm: f.MaxGradNorm = 1.0
    micro_batch_tokens: f.MicroBatchTokens = 2048
    max_bad_steps: f.MaxBadSteps = 5

    @field_validator("rating_range")
    @classmethod
    def _ordered(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(f"{ends} is not a range; write the lowest rating first, then the highest")
        return ends


class NewModelConfig(Section):
    """The randomly initialized model that `surefoot new-model` writes to `policy.model` for `sft`."""

    kind: Literal["transformer", "lstm"] = setting(
        "transformer", "`transformer`: Llama with heads of width 32 and MLPs 2.5 times the width; `lstm`."
    )
    vocab: f.Positive = setting(
        2048, "Most tokens: 256 bytes, an end token, roles of chats, the rest by BPE; 257 reads bytes alone."
    )
    width: f.Positive = setting(128, "Width of a hidden state; of a transformer a multiple of 32.")
    layers: int = setting(2, "Number of layers.", ge=1, le=128)

    @model_validator(mode="after")
    def _can_be_made(self) -> NewModelConfig:
        if self.vocab < 257:
            raise ValueError(
                f"vocab is {self.vocab}; 256 bytes and an end token need 257, more learn pieces of the text"
            )
        if self.kind == "transformer" and self.width % 32:
            raise ValueError(f"width is {self.width}; a transformer's heads take a multiple of 32")
        # Embedding and output layer; 11.5 width² in a layer of a transformer, 8 in an LSTM's.
        weights = 2 * self.vocab * self.width + 12 * self.layers * self.width**2
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"width {self.width}, layers {self.layers} and vocab {self.vocab} make about {weights:.1e} "
                f"weights; at most {MAX_WEIGHTS:.0e} are made here, so give smaller sizes"
            )
        return self

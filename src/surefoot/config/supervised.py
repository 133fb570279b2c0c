"""The sections of supervised runs: fine-tuning on examples, a new model to teach, and reward models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from surefoot.config.sections import Fraction, NonNegative, PathText, Positive, PPOConfig, Section

MAX_HEADS = 32  # each has a bit of a judgement's hash
MAX_WEIGHTS = 1_000_000_000  # of a new model: 4 GB in float32


class SFTConfig(Section):
    """Supervised fine-tuning on examples, in place of a task: what others wrote is made likelier."""

    data: PathText | None = Field(
        None,
        description="JSONL file of `{text}`, `{prompt, completion}` or `{messages}` rows, one kind a file, or a name `surefoot fetch` knows; `null`: rows given in Python.",
    )
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = Field(
        default_factory=dict, description="What the file calls these columns, where it has other names: `{prompt: question}`."
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Fraction of examples kept for evaluation, chosen by a hash of their text."
    )
    max_tokens: Positive | None = Field(
        None,
        description="Longer examples are cut to so many tokens, and counted; `null`: one longer than the model's context is refused.",
    )
    epochs: Positive = Field(3, description="Passes over the examples; rounded up to whole updates.")
    batch_size: Positive = Field(16, description="Examples in one optimiser step.")
    learning_rate: float = Field(2e-4, gt=0, description="Adam's step size at its highest; all weights of a model want less.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate moves over the run."
    )
    lr_warmup: Fraction = Field(0.05, description="Fraction of the run in which the learning rate climbs from 0.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    micro_batch_tokens: Positive = Field(
        2048,
        description="Most tokens (rows × longest row) in one forward and backward pass, rows of like length together. Speed and memory only.",
    )
    max_bad_steps: Positive = Field(5, description="Skipped steps (non-finite loss or gradient) in a row before the run stops.")

    def as_update(self) -> PPOConfig:
        """What `train/` reads: one step on each batch, and nothing of PPO's own."""
        return _one_step(self)


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
            raise ValueError(f"vocab is {self.vocab}; 256 bytes and an end token need 257, and more learn pieces of the text")
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
    """A reward model from people's judgements, in place of a task: a score for whole texts."""

    data: PathText | None = Field(
        None,
        description="JSONL file of pairs, `{prompt, chosen, rejected, margin}`, or of ratings, `{prompt, text, rating}` (prompt and margin may be missing), one kind a file; `null`: rows given in Python.",
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="Fraction of judgements kept for evaluation, chosen by a hash of the prompt, or without one of the text.",
    )
    rating_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Lowest and highest rating there may be, `[-4, 4]`: one outside is refused."
    )
    center: NonNegative = Field(
        0.0, description="Weight of (r_chosen + r_rejected)², which holds the scores of pairs near 0; 0.01 is usual."
    )
    heads: int = Field(
        1,
        ge=1,
        le=MAX_HEADS,
        description="Scores on one trunk, each learned from its own half of the judgements: their mean is the score, their standard deviation tells how unsure it is; 8 is usual. 1: no uncertainty.",
    )
    epochs: Positive = Field(2, description="Passes over the judgements; rounded up to whole updates.")
    batch_size: Positive = Field(32, description="Judgements in one optimiser step.")
    learning_rate: float = Field(2e-4, gt=0, description="Adam's step size at its highest; all weights of a model want less.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate moves over the run."
    )
    lr_warmup: Fraction = Field(0.05, description="Fraction of the run in which the learning rate climbs from 0.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    micro_batch_tokens: Positive = Field(
        2048,
        description="Most tokens (texts × longest text) in one forward and backward pass. Speed and memory only.",
    )
    max_bad_steps: Positive = Field(5, description="Skipped steps (non-finite loss or gradient) in a row before the run stops.")

    @field_validator("rating_range")
    @classmethod
    def _ordered(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(f"{ends} is no range; write the lowest rating first, then the highest")
        return ends

    def as_update(self) -> PPOConfig:
        """What `train/` reads: one step on each batch, and nothing of PPO's own."""
        return _one_step(self)


def _one_step(section: SFTConfig | RewardModelConfig) -> PPOConfig:
    names = PPOConfig.model_fields.keys() & type(section).model_fields.keys()
    return PPOConfig(**{name: getattr(section, name) for name in names}, n_epochs=1, kl_coef=0.0)

"""Learning from examples and preferences: sections `sft`, `ptx`, `reward_model`, `dpo`, `new_model`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from surefoot.config import fields as f
from surefoot.config.fields import ExampleFields, OptimizerFields, Section, setting

_ROWS = "`{prompt?, chosen, rejected, margin?}` or `{prompt?, text, rating}` rows, one kind per file"
MAX_WEIGHTS = 1_000_000_000  # of a new model: 4 GB in float32


class SFTConfig(OptimizerFields, ExampleFields):
    """Supervised fine-tuning on examples, in place of a task: cross-entropy on target completions."""

    epochs: f.Positive = setting(3, "Passes over the examples; rounded up to whole updates.")
    batch_size: f.Positive = setting(16, "Examples in one optimizer step.")


class PTXConfig(ExampleFields):
    """Demonstrations whose NLL is added to PPO's loss (PPO-ptx; Ouyang et al. 2022, arXiv:2203.02155)."""

    batch_size: f.Positive = setting(16, "Demonstrations added to each minibatch; fewer if there are fewer.")
    coef: f.NonNegative = setting(0.5, "Weight of their mean NLL per token; 0: they are only evaluated.")
    schedule: f.Schedule = setting("constant", "Schedule of coef over the run.")


class RewardModelConfig(OptimizerFields):
    """A reward model from people's preferences, in place of a task: a score for whole texts."""

    data: f.FilePath | None = setting(None, f"JSONL file of {_ROWS}; `null`: rows given in Python.")
    held_out: f.HeldOut = 0.1
    rating_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = setting(
        None, "Lowest and highest allowed rating, such as `[-4, 4]`."
    )
    center: f.NonNegative = setting(0.0, "Weight of (r_chosen + r_rejected)², against drift; often 0.01.")
    epochs: f.Positive = setting(2, "Passes over the preferences; rounded up to whole updates.")
    batch_size: f.Positive = setting(32, "Preferences in one optimizer step.")

    @field_validator("rating_range")
    @classmethod
    def _ordered(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError(f"{ends} is not a range; write the lowest rating first, then the highest")
        return ends


class DPOConfig(OptimizerFields):
    """Direct preference optimization, in place of a task (Rafailov et al. 2023, arXiv:2305.18290)."""

    data: f.FilePath | None = setting(None, "JSONL: `{prompt?, chosen, rejected}`; `null`: given in Python.")
    held_out: f.HeldOut = 0.1
    beta: float = setting(0.1, "β: what a nat away from the reference counts in the implicit reward.", gt=0)
    label_smoothing: float = setting(0.0, "Share of pairs taken to be labeled the wrong way.", ge=0, lt=0.5)
    epochs: f.Positive = setting(1, "Passes over the pairs; rounded up to whole updates.")
    batch_size: f.Positive = setting(16, "Pairs in one optimizer step.")
    learning_rate: float = setting(5e-5, "Adam's peak learning rate; ~1e-6 where all weights train.", gt=0)


class NewModelConfig(Section):
    """The randomly initialized model that `surefoot new-model` writes to `policy.model` for `sft`."""

    kind: Literal["transformer", "lstm"] = setting("transformer", "Llama with heads of width 32, or LSTM.")
    vocab: f.Positive = setting(2048, "Most tokens: 256 bytes, an end token, chat roles, the rest BPE.")
    width: f.Positive = setting(128, "Width of a hidden state; of a transformer a multiple of 32.")
    layers: int = setting(2, "Number of layers.", ge=1, le=128)

    @model_validator(mode="after")
    def _can_be_made(self) -> "NewModelConfig":
        if self.vocab < 257:
            raise ValueError(f"vocab is {self.vocab}; bytes and an end token need 257, give that or more")
        if self.kind == "transformer" and self.width % 32:
            raise ValueError(f"width is {self.width}; a transformer's heads take a multiple of 32")
        # Embedding and output layer; 11.5 width² in a layer of a transformer, 8 in an LSTM's.
        weights = 2 * self.vocab * self.width + 12 * self.layers * self.width**2
        if weights > MAX_WEIGHTS:
            sizes = f"width {self.width}, layers {self.layers} and vocab {self.vocab}"
            raise ValueError(f"{sizes} make about {weights:.1e} weights; give at most {MAX_WEIGHTS:.0e}")
        return self

"""Episodes of a text task: the sections `generation`, `rollout`, `rejection_sampling`."""

from typing import Annotated

from pydantic import Field

from surefoot.config.fields import FilePath, Fraction, Positive, Section, setting


class GenerationConfig(Section):
    """How tokens are sampled."""

    max_new_tokens: Positive = setting(24, "Longest completion, in tokens.")
    temperature: float = setting(1.0, "Divides the logits, also in the loss; 0 is greedy.", ge=0, le=10)
    top_k: Positive | None = setting(None, "Sample from the k most probable tokens; refused in training.")
    top_p: Annotated[Fraction, Field(gt=0)] | None = setting(
        None, "From the smallest set of this probability; likewise."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = setting([], "Strings that end a completion.")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = setting([], "End tokens in addition to the model's.")
    chat: bool = setting(False, "Text is a user's message in the chat template; in training as in the task.")
    slots: Positive = setting(64, "Rows decoded together; waiting prompts take the slots of finished rows.")
    tis_cap: Annotated[float, Field(gt=0)] | None = setting(
        None, "Truncated importance sampling (bfloat16): weight min(π_trainer / π_sampler, this); `null`: 1."
    )


class RolloutConfig(Section):
    """How many episodes of a text task are collected."""

    total_episodes: Positive = setting(2000, "Episodes in the whole run; rounded up to whole updates.")
    episodes_per_update: Positive = setting(64, "Episodes collected for one update.")


class RejectionSamplingConfig(Section):
    """Sample completions of a task's prompts and keep those with the best rewards as examples."""

    episodes: Positive = setting(512, "Completions sampled; a multiple of `group.size`.")
    keep: Annotated[Fraction, Field(gt=0)] = setting(0.25, "Fraction of complete ones to keep, best first.")
    join: FilePath | None = setting(None, "JSONL file whose examples are written before the kept ones.")

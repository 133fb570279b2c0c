"""Episodes of a text task: the sections `generation`, `rollout`, `group`, `shaping`, `rejection_sampling`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from surefoot.config.fields import FilePath, Fraction, NonNegative, Positive, Section, setting


class GenerationConfig(Section):
    """How tokens are sampled."""

    max_new_tokens: Positive = setting(24, "Longest completion, in tokens.")
    temperature: float = setting(
        1.0,
        "Divides the logits, in sampling and in the loss; 0 (greedy) is for generation only.",
        ge=0,
        le=10,
    )
    top_k: Positive | None = setting(None, "Sample from the k most probable tokens; refused in training.")
    top_p: float | None = setting(
        None, "Sample from the smallest set with this probability; refused in training.", gt=0, le=1
    )
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        [], "Strings that end a completion, as part of it."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = setting([], "End tokens in addition to the model's.")
    slots: Positive = setting(64, "Rows decoded together; waiting prompts take the slots of finished rows.")
    tis_cap: float | None = setting(
        None,
        "Cap c of truncated importance sampling: where the sampler's log-probs are not the trainer's "
        "(bfloat16), policy losses are weighted by min(π_trainer / π_sampler, c); `null`: by 1.",
        gt=0,
    )


class RolloutConfig(Section):
    """How many episodes of a text task are collected."""

    total_episodes: Positive = setting(2000, "Episodes in the whole run; rounded up to whole updates.")
    episodes_per_update: Positive = setting(64, "Episodes collected for one update.")


class GroupConfig(Section):
    """Several completions of one prompt, compared with each other."""

    size: Positive = setting(
        1, "G: completions per prompt in an update; divides rollout.episodes_per_update."
    )
    skip_zero_variance: bool = setting(False, "Leave groups whose rewards are all equal out of the update.")


class ShapingConfig(Section):
    """From the reward function's result to the reward that is trained on, in this order."""

    missing_eos_penalty: NonNegative | None = setting(
        None, "Subtracted when a completion was cut off by the length limit; `null`: nothing."
    )
    scale: Literal["none", "running_std"] = setting(
        "none", "`running_std`: divide rewards by their running std."
    )
    clip: float | None = setting(None, "Clip rewards to ± this, after scaling.", gt=0)
    whiten: bool = setting(False, "Whiten per-token rewards over the update, keeping their mean.")


class RejectionSamplingConfig(Section):
    """Sample completions of a task's prompts and keep those with the best rewards as examples."""

    episodes: Positive = setting(512, "Completions sampled; a multiple of `group.size`.")
    keep: Annotated[Fraction, Field(gt=0)] = setting(
        0.25, "Fraction kept, highest reward first, of those that are not empty and ended by themselves."
    )
    join: FilePath | None = setting(
        None, "JSONL file of `{prompt, completion}` or `{messages}` rows, written before the kept ones."
    )

"""The section of rejection sampling: which completions of a task's prompts become examples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from surefoot.config.fields import Fraction, PathText, Positive
from surefoot.config.sections import Section


class RejectionSamplingConfig(Section):
    """Sample completions of a task's prompts and keep those with the best rewards as examples (rejection sampling)."""

    episodes: Positive = Field(512, description="Completions sampled; a multiple of `group.size`.")
    keep: Annotated[Fraction, Field(gt=0)] = Field(
        0.25,
        description="Fraction that is kept, highest reward first, of the completions that are not empty and ended by themselves.",
    )
    join: PathText | None = Field(
        None,
        description="JSONL file of `{prompt, completion}` or `{messages}` rows, written before the kept ones.",
    )

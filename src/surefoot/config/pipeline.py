"""The file of `surefoot pipeline`: stages, each a configuration of its own, that name what earlier ones left."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from surefoot.config.sections import Fraction, PathText, Positive, Section
from surefoot.errors import InputError
from surefoot.wording import first_problem

Kind = TypeVar("Kind", bound=Section)


class PseudoLabelsConfig(Section):
    """Let a policy answer the prompts of a task, and keep its best answers as examples to learn from."""

    episodes: Positive = Field(512, description="Answers written.")
    keep: Annotated[Fraction, Field(gt=0)] = Field(
        0.25, description="Fraction of them that is kept, best reward first, of those that ended by themselves."
    )
    join: PathText | None = Field(
        None, description="JSONL file of `{prompt, completion}` or `{messages}` rows that stand before the kept ones."
    )


class PipelineConfig(Section):
    """Several runs, one after the other."""

    folder: PathText = Field(description="Holds a run folder for each stage, by the stage's name.")
    common: dict[str, Any] = Field(default_factory=dict, description="Sections that all stages share; a stage's own go before.")
    stages: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Each stage's name and configuration; `stage:NAME` in place of a path is what an earlier one left.",
    )


def checked(kind: type[Kind], data: Any, where: str) -> Kind:
    """`data` as a `PipelineConfig` or `PseudoLabelsConfig`. Raises InputError naming the key, and the nearest real one."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(first_problem(error.errors(), where=where, kinds=dict.fromkeys(kind.model_fields, ""))) from None

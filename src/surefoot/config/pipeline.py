"""The file of `surefoot pipeline`: stages, each a configuration of its own, that name what earlier ones left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from surefoot.config.fields import Fraction, PathText, Positive
from surefoot.config.messages import first_problem, short
from surefoot.config.sections import Section
from surefoot.errors import InputError

Kind = TypeVar("Kind", bound=Section)

REFERENCE = "stage:"
# What a stage leaves, and the settings that take it.
Product = Literal["a language model", "a reward model", "examples", "an environment's policy"]
TAKEN_BY: dict[str, tuple[Product, ...]] = {
    "policy.model": ("a language model",),
    "policy.critic.model": ("a language model", "a reward model"),
    **dict.fromkeys(("task.reward", "task.reward.name", "task.metric"), ("a reward model",)),
    **dict.fromkeys(("task.prompts", "sft.data", "ptx.data", "pseudo_labels.join"), ("examples",)),
}


class PseudoLabelsConfig(Section):
    """Let a policy answer the prompts of a task, and keep its best answers as examples to learn from."""

    episodes: Positive = Field(512, description="Answers written.")
    keep: Annotated[Fraction, Field(gt=0)] = Field(
        0.25,
        description="Fraction that is kept, best reward first, of those that say something and ended by themselves.",
    )
    join: PathText | None = Field(
        None,
        description="JSONL file of `{prompt, completion}` or `{messages}` rows that stand before the kept ones.",
    )


class PipelineConfig(Section):
    """Several runs, one after the other."""

    folder: PathText = Field(description="Holds a run folder for each stage, by the stage's name.")
    common: dict[str, Any] = Field(
        default_factory=dict, description="Sections that all stages share; a stage's own go before."
    )
    stages: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Each stage's name and configuration; `stage:NAME` in place of a path is what an earlier one left.",
    )


def checked(kind: type[Kind], data: Any, where: str) -> Kind:
    """`data` as a `PipelineConfig` or `PseudoLabelsConfig`. Raises InputError naming the key, and the nearest real one."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: should be a section with settings of its own, got {short(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(
            first_problem(error.errors(), where=where, kinds=dict.fromkeys(kind.model_fields, ""))
        ) from None


def with_products(value: Any, left: Mapping[str, tuple[Product, str]], where: str, *, key: str = "") -> Any:
    """Nested sections anew, each `stage:NAME` replaced by what that stage left: `left` has its kind and path by NAME.

    A part of a reward is then called by the stage's name. Raises InputError for what is no earlier stage, or of no use there.
    """
    if isinstance(value, dict):
        inner = {
            name: with_products(part, left, where, key=f"{key}.{name}".lstrip("."))
            for name, part in value.items()
        }
        name = value.get("name")
        is_model = key == "task.reward" and isinstance(name, str) and name.startswith(REFERENCE)
        return {"label": str(name).removeprefix(REFERENCE)} | inner if is_model else inner
    if isinstance(value, list):
        return [with_products(part, left, where, key=key) for part in value]
    if not (isinstance(value, str) and value.startswith(REFERENCE)):
        return value
    if (name := value.removeprefix(REFERENCE)) not in left:
        known = f"before it are {', '.join(left)}" if left else "no stage stands before it"
        raise InputError(f"{where}: {key}: {value} is no earlier stage; {known}")
    kind, path = left[name]
    if kind not in TAKEN_BY.get(key, ()):
        takes = " or ".join(TAKEN_BY.get(key, ())) or "nothing of a stage's"
        raise InputError(f"{where}: {key} takes {takes}, and stage {name} leaves {kind}")
    return path

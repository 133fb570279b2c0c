"""The file of `surefoot pipeline`: stages, each a configuration, that name what earlier ones left."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surefoot.config.fields import FolderPath, Section, setting
from surefoot.errors import InputError

REFERENCE = "stage:"
# What a stage leaves, and the settings that take it.
Product = Literal["a language model", "a reward model", "examples", "an environment's policy"]
TAKEN_BY: dict[str, tuple[Product, ...]] = {
    "policy.model": ("a language model",),
    "policy.critic.model": ("a language model", "a reward model"),
    **dict.fromkeys(("task.reward", "task.reward.name", "task.metric"), ("a reward model",)),
    **dict.fromkeys(("task.prompts", "sft.data", "ptx.data", "rejection_sampling.join"), ("examples",)),
}


class PipelineConfig(Section):
    """Several runs, one after the other."""

    folder: FolderPath = Field(description="Holds a run folder for each stage, by the stage's name.")
    common: dict[str, Any] = setting({}, "Sections that all stages share; a stage's own take precedence.")
    stages: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Each stage's name and configuration; `stage:NAME` for a path: what that one left.",
    )


def with_products(value: Any, left: Mapping[str, tuple[Product, str]], where: str, *, key: str = "") -> Any:
    """Nested sections with each `stage:NAME` replaced by what it left: `left` has its kind and path by NAME.

    A part of a reward is then labeled with the stage's name. Raises InputError for a name that is not an
    earlier stage, or of no use there.
    """
    if isinstance(value, dict):
        above = f"{key}." if key else ""
        inner = {name: with_products(part, left, where, key=above + name) for name, part in value.items()}
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

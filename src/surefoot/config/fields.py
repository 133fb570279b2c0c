"""What sections are made of: a strict model, kinds of values, texts that may be paths, shared fields."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from surefoot.config.messages import short


class Section(BaseModel):
    """A strict part of the configuration: unknown keys are errors, nothing is coerced, nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field: its default, its documentation in a sentence or two, and pydantic's limits."""
    return Field(default, description=meaning, **limits)


def parts_of(annotation: Any) -> Iterator[Any]:
    """A type, and all types and marks that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from parts_of(part)


def section_in(annotation: Any) -> type[Section] | None:
    """The model that a field holds, itself or in a list, if it is a section."""
    kinds = (part for part in parts_of(annotation) if isinstance(part, type) and not get_args(part))
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


Positive = Annotated[int, Field(gt=0, le=10**9)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]
Schedules = Schedule | Literal["function"]


# --- texts that may be paths, which in a file are relative to it: the type says when they are ---


@dataclass(frozen=True)
class IsPath:
    """Tells a local path from another name: `test(text, folder)`, the folder being that of its file."""

    test: Callable[[str, Path], bool]


def _usable_path(text: str) -> str:
    if not text or "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"{short(text)} is not a name of a file or folder")
    return os.path.expanduser(text)


def _is_there(text: str, folder: Path) -> bool:
    return text.startswith(".") or os.path.exists(folder / text)


PathText = Annotated[str, AfterValidator(_usable_path)]
# Always a path.
FolderPath = Annotated[PathText, IsPath(lambda text, folder: True)]
# A model's folder, or the name of an asset or of a hub's model.
ModelPath = Annotated[PathText, IsPath(_is_there)]
# A file of rows, or an asset's name. A file that is not there yet must not be found elsewhere by accident.
FilePath = Annotated[PathText, IsPath(lambda text, at: "/" in text or ".json" in text or _is_there(text, at))]
# `file.py:function`, or a name that is imported.
FunctionName = Annotated[str, IsPath(lambda text, folder: ".py:" in text)]
# A function, or a reward model's folder.
RewardPath = Annotated[PathText, IsPath(lambda text, folder: ".py:" in text or os.path.isdir(folder / text))]

# --- fields that sections share ---

_ROWS = "`{text}`, `{prompt, completion}` or `{messages}` rows, one kind per file, or a `surefoot fetch` name"
_HELD_OUT = "Share of rows held out for evaluation, by a hash of the prompt (docs/sft.md#what-is-held-out)."
HeldOut = Annotated[float, Field(ge=0, lt=1, description=_HELD_OUT)]


class ExampleFields(Section):
    """What `sft` and `ptx` have in common: the file of examples."""

    data: FilePath | None = setting(None, f"JSONL file of {_ROWS}; `null`: rows given in Python.")
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = setting(
        {}, "The file's names of these columns, where they differ: `{prompt: question}`."
    )
    held_out: HeldOut = 0.1
    max_tokens: Positive | None = setting(
        None, "Longer examples are cut; `null`: refused beyond the model's context."
    )
    mask_history: bool = setting(False, "Of a chat, train on the assistant's last message alone.")


class OptimizerFields(Section):
    """What `ppo`, `sft` and `reward_model` have in common: the steps of Adam."""

    learning_rate: float = setting(2e-4, "Adam's peak learning rate.", gt=0)
    lr_schedule: Schedule = setting("cosine", "Learning rate schedule over the run.")
    lr_warmup: Fraction = setting(0.05, "Fraction of the run in which the learning rate rises from 0.")
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", gt=0)
    max_grad_norm: float = setting(1.0, "The global gradient norm is clipped to this.", gt=0)
    micro_batch_tokens: Positive = setting(2048, "Most tokens (rows × longest) of a pass: memory, not math.")
    max_bad_steps: Positive = setting(5, "Steps skipped in a row (loss or gradient not finite) to stop at.")

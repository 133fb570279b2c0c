"""Tables of the fields, for docs/config.md, `--help` and `help(PPO)`: types, and defaults by kind of run."""

import functools
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel

from surefoot.config import strict_yaml
from surefoot.config.fields import section_in
from surefoot.config.kinds import foreign_sections
from surefoot.config.root import Config

Class = TypeVar("Class", bound=type)
_COMMON = """
    Settings are keywords (`learning_rate=1e-4`); `config` gives them all at once, `verbose=0` shows nothing,
    `run` is a run folder to go on in. Raises InputError for anything unusable, if it can before a model is
    loaded. `learn`, `evaluate`, `save` and `load`: see `api/session.py`.

    Settings, and their defaults:
"""
# What a run of each kind is begun with at least; `recurrent` are environments' with an LSTM.
LEAST: dict[str, dict[str, Any]] = {
    "text": {"task": {"prompts": "prompts.jsonl", "reward": "reward.py:reward"}},
    "env": {"env": {"id": "CartPole-v1"}},
    "recurrent": {"env": {"id": "CartPole-v1"}, "policy": {"model": "MlpLstmPolicy"}},
    "sft": {"sft": {"data": "examples.jsonl"}},
    "reward_model": {"reward_model": {"data": "pairs.jsonl"}},
    "dpo": {"dpo": {"data": "pairs.jsonl"}},
}


class FieldRow(NamedTuple):
    """A field that is not a section."""

    key: str  # dotted
    type: str
    default: str  # the section's own, as YAML
    description: str


@functools.cache
def all_keys() -> dict[str, FieldRow]:
    """Every field and section by its dotted key; sections, which stand before their fields, have no type."""
    return {row.key: row for row in _walk(Config)}


def field_table() -> tuple[FieldRow, ...]:
    """Every field that is not a section, in the order of the models."""
    return tuple(row for row in all_keys().values() if row.type)


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[FieldRow]:
    for name, info in model.model_fields.items():
        key, inner = prefix + name, section_in(info.annotation)
        about = info.description or (inner.__doc__ if inner else None) or ""
        if info.is_required():
            yield FieldRow(key, _type_name(info.annotation), "required", about)
        elif inner is not None:
            yield FieldRow(key, "", "", about)
            yield from _walk(inner, f"{key}.")
        else:
            default = _text(info.get_default(call_default_factory=True))
            yield FieldRow(key, _type_name(info.annotation), default, about)


def defaults_of(key: str) -> dict[str, str]:
    """The default that each kind of run really has of the field `key`, as YAML, by the kinds that have it."""
    section, *_ = *path, leaf = key.split(".")
    found = {}
    for kind, given in LEAST.items():
        parent: Any = _least(kind)
        if section not in foreign_sections(parent.kind):
            for name in path:
                parent = getattr(parent, name, None)
            is_own = parent is None or (len(path) == 1 and leaf in given.get(section, {}))
            found[kind] = all_keys()[key].default if is_own else _text(getattr(parent, leaf))
    if found.get("recurrent") == found.get("env") or key == "policy.model":
        found.pop("recurrent", None)
    return found


def default_text(key: str, *, quote: str = "") -> str:
    """The defaults of a field in one line: one if all kinds of run agree, else each with its kinds."""
    by_value: dict[str, list[str]] = {}
    for kind, value in defaults_of(key).items():
        by_value.setdefault(f"{quote}{value}{quote}", []).append(kind)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(kinds)})" for value, kinds in by_value.items())


def with_settings(keys: dict[str, str]) -> Callable[[Class], Class]:
    """A class decorator: the settings `keys` (keyword -> dotted key) go to its docstring, one line each."""

    def decorate(cls: Class) -> Class:
        lines = [f"{cls.__doc__}".rstrip(), _COMMON]
        for name, row in ((name, all_keys()[key]) for name, key in keys.items()):
            meaning = row.description.split("; ")[0].split(". ")[0].rstrip(".")
            default = f" [{default_text(row.key)}]" if row.type else ""
            lines.append("    " + textwrap.shorten(f"{name}: {meaning}{default}", 104, placeholder=" …"))
        cls.__doc__ = "\n".join([*lines, "    "]) if cls.__doc__ is not None else None  # as with python -OO
        return cls

    return decorate


@functools.cache
def _least(kind: str) -> Config:
    return Config.model_validate(LEAST[kind])


def _text(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return strict_yaml.dump(value).removesuffix("...\n").strip()


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) not in (None, list, dict):
        return " | ".join(_type_name(a) for a in get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))

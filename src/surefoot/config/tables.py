"""Tables of the fields, for docs/config.md, `--help` and `help(PPO)`: types, and defaults by kind of run."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel

from surefoot.config import strict_yaml
from surefoot.config.fields import Section
from surefoot.config.kinds import foreign_sections
from surefoot.config.root import Config

Class = TypeVar("Class", bound=type)
# What a run of each kind is begun with at least; `recurrent` are environments' with an LSTM.
LEAST: dict[str, dict[str, Any]] = {
    "text": {"task": {"prompts": "prompts.jsonl", "reward": "reward.py:reward"}},
    "env": {"env": {"id": "CartPole-v1"}},
    "recurrent": {"env": {"id": "CartPole-v1"}, "policy": {"model": "MlpLstmPolicy"}},
    "sft": {"sft": {"data": "examples.jsonl"}},
    "reward_model": {"reward_model": {"data": "pairs.jsonl"}},
}


class FieldRow(NamedTuple):
    """A field that is not a section."""

    key: str  # dotted
    type: str
    default: str  # the section's own, as YAML
    description: str


@functools.cache
def field_table() -> tuple[FieldRow, ...]:
    """Every field that is not a section, in the order of the models."""
    return tuple(row for row in _walk(Config) if row.type)


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[FieldRow]:
    """Fields and sections of a model; a section, which is followed by its fields, has no type and default."""
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
    own = {row.key: row.default for row in field_table()}[key]
    found = {}
    for kind, (least, given) in _least().items():
        if section not in foreign_sections(least.kind):
            parent: Any = least
            for name in path:
                parent = getattr(parent, name, None)
            found[kind] = own if parent is None or key in given else _text(getattr(parent, leaf))
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
    rows = {row.key: row for row in _walk(Config)}

    def line(name: str, key: str) -> str:
        meaning = rows[key].description.split("; ")[0].split(". ")[0].rstrip(".")
        default = f" [{default_text(key)}]" if rows[key].type else ""
        return textwrap.shorten(f"{name}: {meaning}{default}", 104, placeholder=" …")

    def decorate(cls: Class) -> Class:
        lines = [f"    {line(name, key)}" for name, key in keys.items()]
        if cls.__doc__ is not None:
            head = [cls.__doc__.rstrip(), "", "    Settings, and their defaults:", ""]
            cls.__doc__ = "\n".join([*head, *lines, "    "])
        return cls

    return decorate


@functools.cache
def types_of_keys() -> dict[str, str]:
    """Type of every field by its dotted key; a section's is empty."""
    return {row.key: row.type for row in _walk(Config)}


def section_in(annotation: Any) -> type[Section] | None:
    """The model that a field holds, itself or in a list, if it is a section."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        if get_origin(kind) is list and (inner := section_in(get_args(kind)[0])) is not None:
            return inner
    return None


@functools.cache
def _least() -> dict[str, tuple[Config, set[str]]]:
    """A configuration of each kind of run, and the keys that were given."""
    given = {kind: {f"{name}.{leaf}" for name in data for leaf in data[name]} for kind, data in LEAST.items()}
    return {kind: (Config.model_validate(data), given[kind]) for kind, data in LEAST.items()}


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

"""Configurations from files, flags and nested data, and back; paths relative to the file that names them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surefoot.config import strict_yaml
from surefoot.config.fields import IsPath, Section, parts_of, section_in
from surefoot.config.kinds import foreign_sections
from surefoot.config.messages import Names, as_flag, short, validated
from surefoot.config.rollout import GenerationConfig
from surefoot.config.root import Config
from surefoot.config.tables import all_keys
from surefoot.errors import InputError


def load_config(path: Path | str, overrides: Mapping[str, str] | None = None, sections: Names = ()) -> Config:
    """Read a YAML file, apply `overrides` (dotted key -> YAML scalar, as from flags), check everything.

    Of `sections` that the file lacks the defaults are taken. Relative paths in the file are relative to the
    file; those in overrides to the working directory. Raises InputError: what, where, how to fix it.
    """
    data = {section: {} for section in sections} | read_sections(path)
    make_paths_relative_to(Path(path).parent, data)
    flags = {key.replace("-", "_"): text for key, text in (overrides or {}).items()}
    for key, text in flags.items():
        set_field(data, key, text)
    return make_config(data, where=str(path), flags=flags)


def read_sections(path: Path | str, what: str = "sections such as 'ppo:' at the top") -> dict[str, Any]:
    """The sections of a YAML file, unchecked, without those that are empty. Raises InputError."""
    data = strict_yaml.read(Path(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected {what}, found {short(data)}")
    return {key: value for key, value in data.items() if value is not None}


def make_config(data: dict[str, Any], *, where: str, flags: Names = ()) -> Config:
    """Check nested `data` against the models. Raises InputError naming the key, and the nearest real one.

    `flags` are the dotted keys that came from the command line: a problem with one of them names the flag.
    """
    return validated(Config, data, where=where, keys=all_keys(), flags=flags)


def dump_config(config: Config, *, exclude: Names = ()) -> str:
    """The resolved configuration as YAML, without the sections in `exclude`."""
    return strict_yaml.dump(config.model_dump(mode="json", exclude=set(exclude)))


def absolute_paths(config: Config) -> Config:
    """The same configuration with absolute local paths: it means the same wherever it is read."""
    data = config.model_dump()
    make_paths_relative_to(Path.cwd(), data)
    return make_config(data, where="config")


def sections_for(config: Config | None, kind: str) -> dict[str, Any]:
    """What `config` says, as nested data for a run of that `kind`: without defaults of sections it lacks."""
    if config is None:
        return {}
    foreign, defaults = foreign_sections(kind), Config()
    return {
        name: value
        for name, value in config.model_dump().items()
        if name not in foreign or getattr(config, name) != getattr(defaults, name)
    }


def with_sampling(generation: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """`generation` with other sampling settings. Raises InputError for an unknown name or a wrong value."""
    allowed = ("max_new_tokens", "temperature", "top_k", "top_p")
    for name in changes:
        if name not in allowed:
            raise InputError(f"unknown sampling setting {name!r}; there are {', '.join(allowed)}")
    return validated(GenerationConfig, generation.model_dump() | dict(changes), where="generate")


def set_field(data: dict[str, Any], key: str, text: str) -> None:
    """Set `section.field` from a command-line string. Raises InputError for what is not such a name."""
    if not text.strip():
        raise InputError(f"{as_flag(key)}: the value is empty; write null for none")
    value = strict_yaml.scalar(text)
    is_text = key in all_keys() and "str" in all_keys()[key].type
    if is_text and not isinstance(value, (str, list, type(None))):
        value = text  # a run may be called 7
    *parents, leaf = key.split(".")
    if not all((*parents, leaf)):
        raise InputError(f"{as_flag(key)} is not a flag; surefoot ppo --help lists them")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise InputError(f"{as_flag(key)}: {parent} is {short(data)} in the file, not a section")
    data[leaf] = value


def make_paths_relative_to(folder: Path, data: dict[str, Any], *, model: type[Section] = Config) -> None:
    """Make relative paths in `data` relative to `folder`, in place; other names (assets, modules) stay."""
    match data:
        case {"new_model": dict(), "policy": {"model": str(name)}} if name:  # its folder is not there yet
            data["policy"]["model"] = os.path.normpath(folder / os.path.expanduser(name))
    for name, info in model.model_fields.items():
        value, inner = data.get(name), section_in(info.annotation)
        for part in value if isinstance(value, list) else [value]:  # a section, or the parts of a reward
            if inner is not None and isinstance(part, dict):
                make_paths_relative_to(folder, part, model=inner)
        kinds = (*info.metadata, *parts_of(info.annotation))
        for mark in (kind for kind in kinds if isinstance(kind, IsPath)):
            if value is None:
                data.pop(name, None)
            elif isinstance(value, str) and value[:1] not in ("", "~") and mark.test(value, folder):
                data[name] = os.path.normpath(folder / value)

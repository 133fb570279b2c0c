"""Configurations from files, flags and nested data, and back; paths relative to the file that names them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from surefoot.config import strict_yaml
from surefoot.config.fields import IsPath
from surefoot.config.kinds import foreign_sections
from surefoot.config.messages import as_flag, first_problem, short
from surefoot.config.rollout import GenerationConfig
from surefoot.config.root import Config
from surefoot.config.tables import section_in, types_of_keys
from surefoot.config.task import RewardPart
from surefoot.errors import InputError


def load_config(path: Path | str, overrides: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, apply `overrides` (dotted key -> YAML scalar, as from flags), check everything.

    Relative paths in the file are relative to the file; those in overrides to the working directory.
    Raises InputError with one line: what, where, how to fix it.
    """
    return config_from(read_sections(path), Path(path), overrides)


def read_sections(path: Path | str, what: str = "sections such as 'ppo:' at the top") -> dict[str, Any]:
    """The sections of a YAML file, unchecked, without those that are empty. Raises InputError."""
    data = strict_yaml.read(Path(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected {what}, found {short(data)}")
    return {key: value for key, value in data.items() if value is not None}


def config_from(
    data: dict[str, Any], path: Path, overrides: Mapping[str, str] | None = None, *, where: str = ""
) -> Config:
    """`load_config` for sections that were read from `path`; messages begin with `where`, or `path`."""
    make_paths_relative_to(path.parent, data)
    flags = {key.replace("-", "_"): text for key, text in (overrides or {}).items()}
    for key, text in flags.items():
        set_field(data, key, text)
    return make_config(data, where=where or str(path), flags=flags)


def make_config(data: dict[str, Any], *, where: str, flags: Collection[str] = ()) -> Config:
    """Check nested `data` against the models. Raises InputError naming the key, and the nearest real one.

    `flags` are the dotted keys that came from the command line: a problem with one of them names the flag.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problem = first_problem(error.errors(), where=where, kinds=types_of_keys(), flags=flags)
        raise InputError(problem) from None


def dump_config(config: Config, *, exclude: Collection[str] = ()) -> str:
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
    try:
        return GenerationConfig.model_validate(generation.model_dump() | dict(changes))
    except ValidationError as error:
        raise InputError(first_problem(error.errors(), where="generate", kinds=types_of_keys())) from None


def set_field(data: dict[str, Any], key: str, text: str) -> None:
    """Set `section.field` from a command-line string. Raises InputError for what is not such a name."""
    if not text.strip():
        raise InputError(f"{as_flag(key)}: the value is empty; write null for none")
    value = strict_yaml.scalar(text)
    if "str" in types_of_keys().get(key, "") and not isinstance(value, (str, list, type(None))):
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


def make_paths_relative_to(folder: Path, data: dict[str, Any]) -> None:
    """Make relative paths in `data` relative to `folder`, in place; other names (assets, modules) stay."""
    policy = data.get("policy")
    if data.get("new_model") is not None and isinstance(policy, dict):  # its folder is not there yet
        policy["model"] = _moved(policy.get("model"), IsPath(lambda *_: True), folder)
    _move(Config, data, folder)


def _move(model: type[BaseModel], data: dict[str, Any], folder: Path) -> None:
    for name, info in model.model_fields.items():
        value = data.get(name)
        if isinstance(value, dict) and (inner := section_in(info.annotation)) is not None:
            _move(inner, value, folder)
        elif isinstance(value, list):  # the parts of a reward
            for part in value:
                if isinstance(part, dict) and section_in(info.annotation) is RewardPart:
                    _move(RewardPart, part, folder)
        elif (mark := _mark(info)) is not None:
            data[name] = _moved(value, mark, folder) if name in data else None
            if data[name] is None:
                del data[name]


def _moved(value: Any, mark: IsPath, folder: Path) -> Any:
    is_path = isinstance(value, str) and value[:1] not in ("", "~") and mark.test(value, folder)
    return os.path.normpath(folder / value) if is_path else value


def _mark(found: FieldInfo | Any) -> IsPath | None:
    """The mark of a field whose text may be a path, wherever in its type it stands."""
    inner = (*found.metadata, found.annotation) if isinstance(found, FieldInfo) else get_args(found)
    return found if isinstance(found, IsPath) else next(filter(None, map(_mark, inner)), None)

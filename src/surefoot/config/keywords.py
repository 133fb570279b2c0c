"""Settings as flat keyword arguments of `PPO`, `SFT` and `RewardModel`."""

from __future__ import annotations

import functools
from typing import Any, Literal

from surefoot.config.fields import Section
from surefoot.config.kinds import SUPERVISED, foreign_sections
from surefoot.config.messages import suggestion
from surefoot.config.root import Config
from surefoot.config.tables import section_in, types_of_keys
from surefoot.config.task import TaskConfig
from surefoot.errors import InputError

Algorithm = Literal["ppo", "sft", "reward_model"]
# Sections given whole, as a dictionary, and prefixes of fields that would be named alike.
WHOLE = ("kl", "group", "shaping", "ptx")
PREFIXES = {"run": "run_", "evaluate": "evaluate_", "env.id": "env_", "env.kwargs": "env_"}


@functools.cache
def setting_keys(algorithm: Algorithm = "ppo") -> dict[str, str]:
    """Keyword -> dotted key: `{"learning_rate": "ppo.learning_rate", "run_name": "run.name", "kl": "kl"}`."""
    keys: dict[str, str] = {}
    others = {"task", "new_model", "rejection_sampling", "ppo", *SUPERVISED} - {algorithm}
    if algorithm != "ppo":
        others |= foreign_sections(algorithm)
    for name, info in Config.model_fields.items():
        if name in others:
            continue
        section = section_in(info.annotation)
        if section is None or name in WHOLE:
            keys[name] = name
            continue
        for inner in section.model_fields:
            key = f"{name}.{inner}"
            if key != f"{algorithm}.data":
                keys[PREFIXES.get(name, PREFIXES.get(key, "")) + inner] = key
    return keys


def nested(settings: dict[str, Any], algorithm: Algorithm = "ppo") -> dict[str, Any]:
    """Keywords -> nested data for `make_config`. Raises InputError for a name that does not exist."""
    keys = setting_keys(algorithm)
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in keys:
            near = suggestion(name, keys, "docs/config.md lists them")
            section, _, leaf = name.partition("_")
            if section in keys and f"{section}.{leaf}" in types_of_keys():
                near = f"; it is {section}={{{leaf!r}: ...}}"
            elif algorithm == "ppo" and name in TaskConfig.model_fields:
                near = "; it is TextTask's"
            raise InputError(f"unknown setting {name!r}{near}")
        section, _, leaf = keys[name].rpartition(".")
        target = data.setdefault(section, {}) if section else data
        target[leaf] = value.model_dump() if isinstance(value, Section) else value
    return data

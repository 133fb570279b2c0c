"""Settings as flat keyword arguments of `PPO`, `SFT` and `RewardModel`."""

import functools
from typing import Any

from surefoot.config.fields import Section
from surefoot.config.kinds import SUPERVISED, foreign_sections
from surefoot.config.messages import suggestion
from surefoot.config.tables import all_keys
from surefoot.config.task import TaskConfig
from surefoot.errors import InputError

# Sections given whole, as a dictionary, and prefixes of fields that would be named alike.
WHOLE = ("kl", "group", "shaping", "ptx")
PREFIXES = {"run": "run_", "evaluate": "evaluate_", "env.id": "env_", "env.kwargs": "env_"}
# What the single-file page and TRL call it.
ELSEWHERE = {"samples_per_prompt": "group_size", "num_generations": "group_size"}


@functools.cache
def setting_keys(algorithm: str = "ppo") -> dict[str, str]:
    """Keyword -> dotted key: `{"learning_rate": "ppo.learning_rate", "run_name": "run.name", "kl": "kl"}`."""
    keys: dict[str, str] = {}
    others = {"task", "new_model", "rejection_sampling", "ppo", *SUPERVISED} - {algorithm}
    if algorithm != "ppo":
        others |= foreign_sections(algorithm)
    for key, row in all_keys().items():
        section, _, leaf = key.partition(".")
        if section in others or key in (f"{algorithm}.data", "generation.chat") or "." in leaf:
            continue
        if leaf and section not in WHOLE:
            keys[PREFIXES.get(section, PREFIXES.get(key, "")) + leaf] = key
        elif not leaf and (row.type or key in WHOLE):
            keys[key] = key
    return keys


def nested(settings: dict[str, Any], kind: str = "task") -> dict[str, Any]:
    """Keywords of a kind of run -> nested data for `make_config`. Raises InputError for an unknown name."""
    keys = setting_keys(kind if kind in SUPERVISED else "ppo")
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in keys:
            raise InputError(f"unknown setting {name!r}{_nearest(name, keys, kind)}")
        section, _, leaf = keys[name].rpartition(".")
        target = data.setdefault(section, {}) if section else data
        target[leaf] = value.model_dump() if isinstance(value, Section) else value
    return data


def _nearest(name: str, keys: dict[str, str], kind: str) -> str:
    """What to write instead, in a run of that kind."""
    foreign = foreign_sections(kind)
    for section, _, leaf in (key.partition(".") for key in all_keys()):
        if section in WHOLE and ELSEWHERE.get(name, name) in (leaf, f"{section}_{leaf}"):
            of_text = f"; {section} is for PPO with language models"
            return of_text if section in foreign else f"; it is {section}={{{leaf!r}: ...}}"
    if kind == "task" and name in TaskConfig.model_fields:
        return "; it is TextTask's"
    own = [keyword for keyword, key in keys.items() if key.partition(".")[0] not in foreign]
    return suggestion(name, own, "docs/config.md lists them")

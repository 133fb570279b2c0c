"""The sections `run` and `evaluate`."""

from __future__ import annotations

from pydantic import field_validator

from surefoot.config.fields import FolderPath, Positive, Section, setting
from surefoot.config.messages import short


class RunConfig(Section):
    """Where the run writes its files."""

    name: str | None = setting(
        None, "Name of the run's folder; `null`: `ppo-1`, `ppo-2` and so on, the first that is free."
    )
    folder: FolderPath = setting("runs", "Folder that holds run folders.")
    checkpoint_every: Positive = setting(
        10,
        "Updates between checkpoints; with `env` by default 25,600 timesteps, at most 100 updates.",
    )
    keep_checkpoints: int = setting(2, "Latest checkpoints kept, in addition to the best one.", ge=2)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is None:
            return None
        is_plain = name.isprintable() and ".." not in name and not set(name) & set("/\\")
        if not is_plain or name in {"", "."} or len(name.encode()) > 200:
            raise ValueError(
                f"{short(name)} is not a plain folder name; leave out slashes and '..', at most 200 bytes"
            )
        return name


class EvaluateConfig(Section):
    """Evaluation on held-out prompts or examples, or in a separate environment."""

    every: Positive | None = setting(10, "Updates between evaluations; `null`: only at start and end.")
    episodes: int = setting(
        64,
        "Held-out prompts, examples or (with `env`) episodes per evaluation, the same each time; 0: none.",
        ge=0,
    )

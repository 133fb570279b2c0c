"""The run folder: everything a run leaves on disk.

config.yaml        the whole resolved configuration
environment.json   versions and hardware the run was started with
metrics.jsonl      one object an update, names as in docs/metrics.md
samples.jsonl      prompts, answers, reward parts and KL
tensorboard/       the same metrics for TensorBoard
checkpoints/       see train/checkpoint.py
model/             the trained model, written when the run ends
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from surefoot.config import Config, dump_config, load_config
from surefoot.errors import InputError

LOGS = ("metrics.jsonl", "samples.jsonl")


class RunFolder:
    """One run's folder, held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    @staticmethod
    def free_name(config: Config, prefix: str) -> str:
        """`prefix-1`, `prefix-2`, … the one after the last that is taken."""
        folder = Path(config.run.folder)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        taken = [int(match[1]) for name in names if (match := re.fullmatch(rf"{re.escape(prefix)}-(\d+)", name))]
        return f"{prefix}-{max(taken, default=0) + 1}"

    @staticmethod
    def check_free(config: Config) -> None:
        """Raise InputError if the run's name is taken: better before a model is loaded than after."""
        if config.run.name is not None and (path := Path(config.run.folder) / config.run.name).exists():
            raise InputError(
                f"the run folder {path} exists; continue it with 'surefoot resume {path}' or choose another run.name"
            )

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make a new folder and write config and environment. Raises InputError if the name is taken."""
        cls.check_free(config)
        path = Path(config.run.folder) / (config.run.name or cls.free_name(config, "ppo"))
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"the run folder {path} cannot be made: {error.strerror}") from None
        run = cls(path)
        run.hold()
        write_durably(path / "config.yaml", dump_config(config).encode())
        write_durably(path / "environment.json", json.dumps(_environment(), indent=1).encode())
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run. Raises InputError if it is none."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path} is not a run folder: it has no config.yaml")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def config(self) -> Config:
        """The configuration the run was started with."""
        return load_config(self.path / "config.yaml")

    def hold(self) -> None:
        """Take the folder for this process until it ends. Raises InputError if another process holds it."""
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InputError(f"{self.path} is in use by another process; wait for it or stop it first") from None
        self._lock = lock

    def release(self) -> None:
        """Let others take the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, log: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one JSON line per row to a log."""
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        with (self.path / log).open("a", encoding="utf-8") as file:
            file.write(lines)

    def log_sizes(self) -> dict[str, int]:
        """Bytes in each log: a checkpoint keeps them, so that resuming can cut what came after it."""
        return {log: (self.path / log).stat().st_size if (self.path / log).exists() else 0 for log in LOGS}

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Forget log lines written after a checkpoint."""
        for log in LOGS:
            path = self.path / log
            if path.exists() and path.stat().st_size > sizes.get(log, 0):
                os.truncate(path, sizes.get(log, 0))

    def read(self, log: str) -> list[dict[str, Any]]:
        """All rows of a log; a last line cut short by a kill is left out."""
        path = self.path / log
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent whatever happens: aside, fsynced, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _environment() -> dict[str, Any]:
    packages = ("surefoot", "torch", "transformers", "peft", "safetensors", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
    }

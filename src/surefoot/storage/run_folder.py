"""The run folder: everything a run leaves on disk.

config.yaml        the whole resolved configuration
environment.json   versions and hardware the run was started with, and the id that trackers know it by
metrics.jsonl      one object an update, names as in docs/metrics.md
samples.jsonl      prompts, completions, reward parts and KL
tensorboard/       the same metrics for TensorBoard
checkpoints/       see train/checkpoint.py
model/             the trained model, written when the run ends
completions.jsonl  of rejection sampling: the examples, written when the run ends
progress.json      of rejection sampling: how far it is
history.jsonl      of a run that went on with other settings: when, from what, to what
calibration.json   of a reward model: its predictions beside what people said, with a plot where matplotlib is
"""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import platform
import re
import stat
import sys
import time
import uuid
import weakref
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from surefoot.config import Config, absolute_paths, dump_config, load_config
from surefoot.errors import InputError
from surefoot.storage.files import sync, whole_folder, write_durably, writing

LOGS = ("metrics.jsonl", "samples.jsonl")
HELD: "weakref.WeakSet[RunFolder]" = weakref.WeakSet()  # those that this process has held
PACKAGES = ("surefoot", "torch", "transformers", "peft", "safetensors", "numpy")


class RunFolder:
    """One run's folder, held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.is_at_work = False  # whether it is not only held but being written to
        self._unlock: weakref.finalize[[int], RunFolder] | None = None
        self._lock = -1
        self._sizes: dict[str, tuple[int, int]] = {}  # of logs: the file's number and bytes, as we left it

    @staticmethod
    def free_name(config: Config, prefix: str) -> str:
        """`prefix-1`, `prefix-2`, … the one after the last that is taken."""
        folder = Path(config.run.folder)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        matches = [re.fullmatch(rf"{re.escape(prefix)}-(\d+)", name) for name in names]
        return f"{prefix}-{max((int(match[1]) for match in matches if match), default=0) + 1}"

    @staticmethod
    def check_free(config: Config) -> None:
        """Raise InputError if the run's folder cannot be made: better before a model is loaded than after."""
        if config.run.name is not None and os.path.lexists(path := Path(config.run.folder) / config.run.name):
            how = f"; continue it with 'surefoot resume {path}'"
            if not (path / "config.yaml").is_file():
                how = ", but has no config.yaml and is an incomplete run; remove it"
            raise InputError(f"the run folder {path} exists{how} or choose another run.name")
        folder = Path(config.run.folder).absolute()
        place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            wrong = f"no folder can be made in {place}; choose another"
            raise InputError(f"run.folder {config.run.folder}: {wrong}")

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """A new folder, which appears with config and environment. Raises InputError if the name is taken."""
        cls.check_free(config)
        contents = {
            "config.yaml": dump_config(absolute_paths(config)),
            "environment.json": json.dumps(_environment(), indent=1),
        }
        with writing(f"the run folder {Path(config.run.folder, config.run.name or '')}"):
            for tries_left in reversed(range(1 if config.run.name else 100)):
                path = Path(config.run.folder) / (config.run.name or cls.free_name(config, config.verb))
                try:
                    with whole_folder(path) as aside:
                        run = cls(aside)
                        run.hold()
                        for name, text in contents.items():
                            write_durably(aside / name, text.encode())
                    break
                except OSError as error:  # of several runs that want the next free number, each gets one
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not tries_left:
                        raise
            sync(path.parent)
        run.path = path  # the lock goes with the folder
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
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

    def change(self, config: Config, keys: Iterable[str]) -> None:
        """Go on with `config`, other in the fields `keys`; what they were stands in history.jsonl."""

        def values(config: Config) -> dict[str, Any]:
            return {key: functools.reduce(getattr, key.split("."), config) for key in keys}

        self.hold()
        with writing(self.path), (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
            line = {"time": time.strftime("%FT%TZ", time.gmtime())}
            file.write(json.dumps(line | {"from": values(self.config()), "to": values(config)}) + "\n")
            write_durably(self.path / "config.yaml", dump_config(config).encode())

    @property
    def is_held(self) -> bool:
        """Whether `hold` was called since the last `release`."""
        return self._unlock is not None

    def hold(self) -> None:
        """Take the folder until `release` or the end of this object. Raises InputError if it is taken.

        Another object of this process that is not at work, such as what was loaded before, lets go of it.
        """
        if self.is_held:
            return
        with writing(self.path):
            lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
        ours = [other for other in HELD if other.is_held and os.path.sameopenfile(other._lock, lock)]
        for other in ours:
            if not other.is_at_work:
                other.release()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            who = "this very process, which is learning in it" if ours else "another run"
            raise InputError(f"{self.path} is in use by {who}; wait for it or stop it first") from None
        self._lock, self._unlock = lock, weakref.finalize(self, os.close, lock)
        self._place = self.path.stat()
        self._sizes.clear()
        HELD.add(self)

    def release(self) -> None:
        """Let others take the folder."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        self.is_at_work = False

    def check_there(self) -> None:
        """Raise InputError if the folder that is held no longer has its name: nothing belongs there then."""
        if self.is_held and not (self.path.exists() and os.path.samestat(self.path.stat(), self._place)):
            what = "was moved, removed or replaced while the run was writing to it; nothing more is written"
            raise InputError(f"{self.path} {what}. Go on from where its last checkpoint is now")

    def append(self, log: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add one JSON line per row to a log. Raises InputError if the disk does not take them."""
        lines = "".join(json.dumps(_plain(row), ensure_ascii=False, default=str) + "\n" for row in rows)
        path, fix = self.path / log, "; the last checkpoint stands"
        self.check_there()
        found = path.stat() if path.exists() else None
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no regular file{fix}")
        now, before = (found.st_ino, found.st_size) if found else (0, 0), self._sizes.get(log)
        if before is not None and now != before:
            what = f"it has {now[1]} bytes and the run left {before[1]}" if found else "it is gone"
            print(f"surefoot: {path} was changed under the run ({what}); it goes on there", file=sys.stderr)
        # A lone surrogate has no UTF-8; as `\\udXXX` it is JSON's own escape and reads back the same.
        with writing(path, fix), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
        left = path.stat()
        self._sizes[log] = left.st_ino, left.st_size

    def log_sizes(self) -> dict[str, int]:
        """Bytes in each log, durable from here on: a checkpoint keeps them, and resuming cuts the rest."""
        paths = [path for log in LOGS if (path := self.path / log).exists()]
        for path in paths:
            sync(path)
        return dict.fromkeys(LOGS, 0) | {path.name: path.stat().st_size for path in paths}

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Forget log lines written after a checkpoint; say on stderr where lines from before it are gone."""
        for log in LOGS:
            path, wanted = self.path / log, sizes.get(log, 0)
            size = path.stat().st_size if path.exists() else 0
            if size > wanted:
                os.truncate(path, wanted)
            elif size < wanted:
                lost = f"{wanted - size} of the {wanted} bytes that it had at the checkpoint are gone"
                print(f"surefoot: {path}: {lost}; the run goes on without those rows", file=sys.stderr)

    def read(self, log: str) -> list[dict[str, Any]]:
        """All rows of a log; a last line cut short by a kill, perhaps within a character, is left out."""
        written = path.read_bytes() if (path := self.path / log).is_file() else b""
        return [json.loads(line) for line in written.split(b"\n")[:-1]]


def _let_go() -> None:
    """A forked process, such as an environment's worker, must not keep a run's folder from the next one."""
    for run in HELD:
        run.release()


os.register_at_fork(after_in_child=_let_go)


def _plain(value: Any) -> Any:
    """`value` with null for each number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> dict[str, Any]:
    versions = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    machine = {"system": platform.platform(), "processors": os.cpu_count()}
    return {"id": uuid.uuid4().hex, "python": platform.python_version(), **machine, "packages": versions}

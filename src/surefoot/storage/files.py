"""Writes that are whole or absent, whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from surefoot.errors import InputError


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent whatever happens: aside, fsynced, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def writing(path: Path | str, note: str = "") -> Iterator[None]:
    """Make what keeps the block from writing `path` an InputError, which ends with `note`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} could not be written: {reason}{note}") from error


def sync(path: Path) -> None:
    """Make a file's contents, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder aside to write into, which becomes `folder` when it is whole and vanishes when writing fails.

    Raises OSError where the disk does not take it, or `folder` has something in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name: what lies beside `folder` belongs to others.
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        aside = beside / "folder"  # with the permissions that folders usually have, which `beside` has not
        aside.mkdir()
        yield aside
        os.replace(aside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

"""Writes that are whole or absent, whatever happens."""

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from surefoot.errors import InputError

ASIDE = ".unfinished"  # how the name of a folder ends that is being written


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
    except Exception as error:
        # Rust's tokenizers raise a plain Exception where a disk is full.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} could not be written: {reason}{note}") from error


def sha256(path: Path) -> str:
    """A file's digest, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    for path in folder.parent.glob(f"{glob.escape(folder.name)}.*{ASIDE}"):
        with contextlib.suppress(OSError), _locked(path):  # its writer was killed
            shutil.rmtree(path, ignore_errors=True)
    # Under another name: what lies beside `folder` belongs to others.
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{ASIDE}")
    aside.mkdir()
    try:
        with _locked(aside):
            yield aside
            os.replace(aside, folder)  # and a kill from here on leaves nothing
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder` in the block, or until this process dies. Raises OSError where another does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

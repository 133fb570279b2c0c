"""safetensors files: whether one is whole, and what is in it. The only form weights are read in."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from surefoot.errors import InputError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in separate memory. Raises InputError for any other file."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a safetensors file that can be read: {error}") from None


def check_safetensors(path: Path) -> None:
    """Raise InputError unless the file's header is sound and the file as long as the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, 100_000_000):
            raise InputError(f"{path}: not a whole safetensors file ({size} bytes, header of {header_size})")
        try:
            header = json.loads(file.read(header_size))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path}: not a safetensors file; its header is damaged") from None
    if (whole := 8 + header_size + end) != size:
        raise InputError(f"{path}: half-written: {size} bytes of {whole}; fetch or save it again")

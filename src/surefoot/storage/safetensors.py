"""safetensors files: whether one is whole, and what is in it. The only form weights are read in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from surefoot.errors import InputError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in separate memory. Raises InputError for any other file."""
    with _reading(file):
        return {name: tensor.clone() for name, tensor in load_file(file).items()}


def read_dtypes(file: Path) -> dict[str, str]:
    """What a safetensors file's tensors are stored as, `{"lm_head.weight": "BF16"}`, without reading them.

    Raises InputError unless the file's header is sound and the file as long as the header says.
    """
    with _reading(file), safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    if file.exists() and not file.is_file():  # reading a pipe or a device may never end
        raise InputError(f"{file}: not a regular file")
    try:
        yield
    except (OSError, SafetensorError) as error:
        wrong = f"{file}: half-written or damaged; fetch or save it again"
        raise InputError(f"{wrong}; not a safetensors file that can be read: {error}") from None

"""Rows of JSONL files, lists and Datasets: read, checked, split and put in order by one rule each."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from surefoot.core.seeds import derived_seed
from surefoot.errors import InputError

Prompt = str | list[dict[str, Any]]
Row = TypeVar("Row")
Parse = Callable[[Any, str, Row | None], Row]

MAX_ROWS = 1_000_000  # of what does not say how many it has
MAX_LINE_BYTES = 16_000_000  # far beyond any context; a file without line breaks must not fill the memory


def read_rows(source: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSONL file's lines that are not blank, or of a list's or Dataset's rows, unchecked.

    Raises InputError, which calls the source `name`, for one that cannot be read.
    """
    kind = type(source).__name__
    if isinstance(source, (str, Path)):
        yield from _read_jsonl(Path(source), name)
    elif isinstance(source, Mapping) or hasattr(source, "iterrows"):
        way = "one split of a DatasetDict, or table.to_dict('records') of a DataFrame"
        raise InputError(f"{name}: a {kind} is not a list of rows; take {way}")
    elif isinstance(source, Set):
        raise InputError(f"{name}: a set has no order that a run could repeat; give a list")
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        for number, row in enumerate(source, start=1):
            if number > MAX_ROWS and not isinstance(source, Sized):
                what = f"more than {MAX_ROWS:,} rows of a {kind}, which may have no end"
                raise InputError(f"{name}: {what}; take a part, with itertools.islice or take(), or a list")
            yield f"{name}, row {number}", row
    else:
        raise InputError(f"{name}: expected a list, a JSONL file or a datasets.Dataset, got {kind}")


def split(rows: Sequence[Row], keys: Sequence[str], held_out: float) -> tuple[list[Row], list[Row]]:
    """`rows` in two, in their order: those to train on and those held out for evaluation.

    A row is held out if the hash of its key, a number in [0, 1), is below the fraction `held_out`: rows of
    one key stay together, and more rows move none across. But where that would hold out none, the key of the
    lowest hash is held out, unless more than half of the rows have it; where it would hold out all, the key
    of the highest is trained on. Raises InputError for a fraction outside [0, 1).
    """
    if isinstance(held_out, bool) or not 0 <= held_out < 1:
        raise InputError(f"held_out: expected a fraction from 0 to below 1, got {held_out!r}")
    digests = [hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in keys]
    hashes = [int.from_bytes(digest[:8], "little") / 2**64 for digest in digests]
    is_out = [h < held_out for h in hashes]
    if all(is_out):
        is_out = [h != max(hashes) for h in hashes]
    elif held_out and not any(is_out) and hashes.count(min(hashes)) <= len(hashes) / 2:
        is_out = [h == min(hashes) for h in hashes]
    parts = [[row for row, out in zip(rows, is_out, strict=True) if out is side] for side in (False, True)]
    return parts[0], parts[1]


def index_in_order(number: int, count: int, seed: int) -> int:
    """Which of `count` rows is number `number` of a run: each pass over them is shuffled by (seed, pass)."""
    epoch, position = divmod(number, count)
    return shuffled(count, seed, epoch)[position]


@functools.lru_cache(maxsize=2)  # it is asked for once per row; two are in use
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of pass number `epoch` over `count` rows: a permutation of their indices."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "prompt order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def checked_prompt(prompt: Any, where: str) -> Prompt:
    """`prompt` if it is a string that is not blank, or a list of messages. Raises InputError otherwise."""
    if isinstance(prompt, str):
        return checked_text(prompt, where, "the prompt")
    parts = {"role", "content"}
    if not (isinstance(prompt, list) and all(isinstance(m, Mapping) and parts <= set(m) for m in prompt)):
        needed = "text or a list of {role, content} messages"
        raise InputError(f"{where}: a prompt must be {needed}, got {type(prompt).__name__}")
    if not prompt:
        raise InputError(f"{where}: the prompt has no messages; give it one or drop it")
    for message in prompt:
        for part in sorted(parts):
            checked_text(message[part], where, f"a message's {part}", may_be_empty=True)
    return [dict(message) for message in prompt]


def checked_text(text: Any, where: str, name: str, fix: str = "", *, may_be_empty: bool = False) -> str:
    """`text` if it is a string, not blank, of whole characters. Raises InputError, by `name`, otherwise."""
    if not isinstance(text, str):
        raise InputError(f"{where}: {name} must be text, got {type(text).__name__}{fix}")
    if not (text.strip() or may_be_empty):
        raise InputError(f"{where}: {name} is empty; give it text or drop it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair is not a character; fix the encoding") from None
    return text


class SplitRows(Generic[Row]):
    """The rows of `source`, called `name`, that `parse` makes: `train` and, as `split` says, `held_out`.

    `parse` gets what was read, where it stands, and the first row (None: this is it); rows of one `key` stay
    together. Raises InputError where there are none.
    """

    what: str  # what the rows are

    def __init__(self, source: Any, name: str, parse: Parse[Row], key: Callable[[Row], Any], held_out: float):
        rows: list[Row] = []
        for where, row in read_rows(source, name):
            rows.append(parse(row, where, rows[0] if rows else None))
        self.source = source if isinstance(source, (str, Path)) else name
        if not rows:
            raise InputError(f"{self.source}: no {self.what} there; at least one is needed")
        keys = [json.dumps(key(row), default=str) for row in rows]
        self.train, self.held_out = split(rows, keys, held_out)


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # it may never answer, or never end
            raise InputError(f"{name}: {path} is a pipe or a device; write the rows to a file")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield f"{path}, line {number}", _parse_line(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise InputError(f"{name}: no file {path}; name a JSONL file, or give a list or Dataset") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse_line(line: bytes, where: str) -> Any:
    needed = "one object or string per line is needed"
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes; {needed}")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; {needed}") from None

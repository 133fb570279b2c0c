"""The wording of what users are told, in one place: a test names the facts, `messages.txt` has the words.

`SUREFOOT_MESSAGES=add pytest tests/…` adds what is new; `make messages` runs every test and leaves only what was seen.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from surefoot import InputError

FILE = Path(__file__).with_name("messages.txt")
# What differs from case to case: what a library said, what was quoted, where it lies, how much it is.
CHANGING = (
    (re.compile(r"(can be loaded|cannot be imported|raised \w+|can be (?:parsed|read)|not JSON|serializing): .*"), r"\1: …"),
    (re.compile(r"\breturned .*?( for sample|; a list)"), r"returned …\1"),
    (re.compile(r"""(?<!\w)'(?:\\.|[^'\\])*'|(?<!\w)"(?:\\.|[^"\\])*\""""), "'…'"),
    (re.compile(r"(?<![\w.…])/[^\s:;,()'\"]+"), "PATH"),
    (re.compile(r"(?<![A-Za-z_\d])(?<![A-Za-z]-)\d+(?:[.,_]\d+)*(?:e[-+]?\d+)?"), "N"),
    (re.compile(r"\[(?:'…'|N)?(?:, (?:'…'|N))*\]"), "[…]"),
)
seen: set[str] = set()


def wording(message: str) -> str:
    """A message without what changes from case to case."""
    for pattern, word in CHANGING:
        message = pattern.sub(word, message)
    return message


def check(message: str, *names: str) -> str:
    """The message, which is one line, has all `names` in it, and is worded as `messages.txt` has it."""
    assert message and "\n" not in message, message
    for name in names:
        assert name in message, f"{name!r} is not in: {message}"
    line = wording(message)
    seen.add(line)
    known = FILE.read_text(encoding="utf-8").splitlines()
    mode = os.environ.get("SUREFOOT_MESSAGES")
    if line not in known and mode == "add":
        write({*known, line})
    elif line not in known and mode != "renew":
        near = "".join(f"\n  near it: {other}" for other in difflib.get_close_matches(line, known, n=1, cutoff=0.5))
        pytest.fail(f"not in tests/messages.txt (SUREFOOT_MESSAGES=add adds it): {line}{near}")
    return message


@contextlib.contextmanager
def refused(*names: str, error: type[Exception] = InputError) -> Iterator[None]:
    """What is done within is refused, by `error`, in one line of the golden wording that has `names` in it."""
    with pytest.raises(error) as caught:
        yield
    check(str(caught.value), *names)


def write(lines: set[str]) -> None:
    """The golden file, sorted, so that two branches' additions merge."""
    FILE.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")

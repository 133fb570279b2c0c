"""Examples to imitate: what a supervised run reads in place of a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surefoot.envs.text import checked_prompt, checked_text, hash_fraction, read_rows, shuffled
from surefoot.errors import InputError
from surefoot.types import Demonstration

KINDS = (("text",), ("prompt", "completion"), ("messages",))
_ROLES = [name for kind in KINDS for name in kind]


class Demonstrations:
    """Texts, pairs of prompt and completion, or chats, all of one kind, some of them held out.

    `data` is a JSONL file, a list or a `datasets.Dataset` of rows `{"text": …}` (or plain strings), `{"prompt": …,
    "completion": …}` or `{"messages": [{"role": …, "content": …}, …]}`; other columns are left alone. `columns` maps these
    names to the data's own. `held_out` is the fraction kept for evaluation, chosen by a hash of the contents: of several at
    least one. Raises InputError, naming the line (of a list: `name` and the row), for rows of another kind than the first or
    with nothing to learn, and where all would be held out.
    """

    def __init__(
        self,
        data: Any,
        *,
        held_out: float = 0.1,
        columns: Mapping[Any, str] | None = None,
        name: str = "data",
    ):
        source = data if isinstance(data, (str, Path)) else name
        columns = dict(columns or {})
        # A column that was given another role is not also what its own name says.
        columns = {role: role for role in _ROLES if role not in columns.values()} | columns
        examples: list[Demonstration] = []
        for where, row in read_rows(data, name):
            examples.append(_demonstration(row, columns, where, like=examples[0] if examples else None))
        if not examples:
            raise InputError(f"{source}: no examples there; one is needed at least")
        places = [hash_fraction(json.dumps(example.contents, default=str)) for example in examples]
        is_held_out = [place < held_out for place in places]
        if held_out and not any(is_held_out) and places.count(nearest := min(places)) <= len(places) / 2:
            # Of few examples chance may hold out none: then the nearest is, or there would be nothing to evaluate on.
            is_held_out = [place == nearest for place in places]
        self.train = [example for example, held in zip(examples, is_held_out, strict=True) if not held]
        self.held_out = [example for example, held in zip(examples, is_held_out, strict=True) if held]
        if not self.train:
            raise InputError(
                f"{source}: no examples to train on: all {len(examples)} were held out; lower held_out (0: none) or give more"
            )

    def training_index(self, number: int, seed: int) -> int:
        """Which of `train` comes as number `number` of the run: every epoch has its own order."""
        epoch, position = divmod(number, len(self.train))
        return shuffled(len(self.train), seed, epoch)[position]


def _demonstration(
    row: Any, columns: Mapping[str, str], where: str, *, like: Demonstration | None
) -> Demonstration:
    if isinstance(row, str):
        row = {columns.get("text", "text"): row}
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: expected an object with text, prompt and completion, or messages, got {type(row).__name__}"
        )
    found = [name for name in _ROLES if name in columns and columns[name] in row]
    if tuple(found) not in KINDS:
        has = ", ".join(map(str, row)) or "nothing"
        raise InputError(
            f"{where}: has {has}; one of text, prompt and completion, or messages is needed (columns renames)"
        )
    if like is not None and found != list(like.contents):
        raise InputError(
            f"{where}: has {' and '.join(found)}, but {like.where} has {' and '.join(like.contents)}; a file holds one kind"
        )
    return Demonstration(where, {name: _checked(name, row[columns[name]], where) for name in found})


def _checked(name: str, value: Any, where: str) -> Any:
    if name == "messages":
        if not isinstance(value, list):
            raise InputError(f"{where}: messages is a list of {{role, content}}, got {type(value).__name__}")
        messages = checked_prompt(value, where)
        if not any(isinstance(message, dict) and message["role"] == "assistant" for message in messages):
            raise InputError(f"{where}: no assistant's message to learn; give the chat one or drop it")
        return messages
    if not isinstance(value, str):
        mend = "; a chat goes in whole, as messages" if isinstance(value, list) else ""
        raise InputError(f"{where}: {name} is text, got {type(value).__name__}{mend}")
    if not value.strip():
        raise InputError(f"{where}: the {name} is empty; give it text or drop the row")
    return checked_text(value, where)

"""Demonstrations: what a supervised run learns to write."""

import functools
from collections.abc import Mapping
from typing import Any

from surefoot.data.rows import SplitRows, checked_prompt, checked_text
from surefoot.errors import InputError
from surefoot.types import Demonstration

KINDS = (("text",), ("prompt", "completion"), ("messages",))
_ROLES = [name for kind in KINDS for name in kind]


class Demonstrations(SplitRows[Demonstration]):
    """Texts, pairs of prompt and completion, or chats, all of one kind, split into `train` and `held_out`.

    `data` is a JSONL file, a list or a `datasets.Dataset` of rows `{"text": …}` (or plain strings),
    `{"prompt": …, "completion": …}` or `{"messages": [{"role": …, "content": …}, …]}`; `tools`
    beside messages are for the chat template, other columns are ignored. `columns` maps these names to the
    data's own. `held_out` is the fraction kept for evaluation, by a hash of the row's contents
    (`data/rows.py:split`). Raises InputError, naming the line (of a list: `name` and the row), for rows of
    another kind than the first or with nothing to learn.
    """

    what = "demonstrations"

    def __init__(
        self,
        data: Any,
        *,
        held_out: float = 0.1,
        columns: Mapping[Any, str] | None = None,
        name: str = "data",
    ):
        given = dict(columns or {})
        # A column that was given another role does not also have the one of its name.
        roles = {role: role for role in _ROLES if role not in given.values()} | given
        parse = functools.partial(_example, roles)
        super().__init__(data, name, parse, lambda example: example.contents, held_out)


def _example(columns: Mapping[str, str], row: Any, where: str, first: Demonstration | None) -> Demonstration:
    if isinstance(row, str):
        row = {columns.get("text", "text"): row}
    needed = "text, prompt and completion, or messages"
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object with {needed}, got {type(row).__name__}")
    found = [name for name in _ROLES if name in columns and columns[name] in row]
    if tuple(found) not in KINDS:
        has = ", ".join(map(str, row)) or "no columns"
        raise InputError(f"{where}: has {has}; needs {needed} (columns: other names)")
    if first is not None and found != list(first.contents):
        this, that = " and ".join(found), " and ".join(first.contents)
        raise InputError(f"{where}: has {this}, but {first.where} has {that}; all rows must be of one kind")
    contents = {name: _checked(name, row[columns[name]], where) for name in found}
    return Demonstration(where, contents, row.get("tools"))


def _checked(name: str, value: Any, where: str) -> Any:
    if name != "messages":
        fix = "; give the whole chat as messages" if isinstance(value, list) else ""
        return checked_text(value, where, f"the {name}", fix)
    if not isinstance(value, list):
        kind = type(value).__name__
        raise InputError(f"{where}: messages must be a list of {{role, content}}, got {kind}")
    messages = checked_prompt(value, where)
    if not any(isinstance(message, dict) and message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no assistant's message to learn; add one to the chat or drop it")
    return messages

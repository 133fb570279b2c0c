"""Preferences: what a reward model learns from, pairs of texts or texts with ratings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.data.rows import checked_prompt, checked_text, index_in_order, read_rows, split
from surefoot.errors import InputError
from surefoot.types import Preference

SIDES = ("chosen", "rejected")


class PreferenceDataset:
    """Pairs of a chosen and a rejected text, or rated texts, split into `train` and `held_out`.

    `data` is a JSONL file, a list or a `datasets.Dataset` of rows `{"prompt"?, "chosen", "rejected",
    "margin"?}` or `{"prompt"?, "text" or "completion", "rating"}`; other columns are ignored. Texts are
    strings, or lists of one assistant's message. `held_out` is the fraction kept for evaluation, by a hash of
    the prompt, or without one of the texts (`data/rows.py:split`). Raises InputError, naming the line, for
    unusable rows, and for rows of two kinds or training rows that are all alike.
    """

    def __init__(self, data: Any, *, held_out: float = 0.1, rating_range: Sequence[float] | None = None):
        rows: list[Preference] = []
        for where, row in read_rows(data, "data"):
            rows.append(_preference(row, where, rating_range, first=rows[0] if rows else None))
        source = data if isinstance(data, (str, Path)) else "data"
        if not rows:
            raise InputError(f"{source}: no preferences there; at least two that differ are needed")
        self.of_pairs = len(rows[0].texts) == 2
        keys = [json.dumps(row.prompt or sorted(row.texts), default=str) for row in rows]
        self.train, self.held_out = split(rows, keys, held_out)
        few = f"{source}: all {len(self.train)}"
        if not self.of_pairs and len({row.label for row in self.train}) == 1:
            raise InputError(f"{few} ratings to train on are {self.train[0].label:g}; add texts with others")
        if self.of_pairs and len({(row.texts, row.label) for row in self.train}) == 1:
            raise InputError(f"{few} pairs to train on have the same chosen and rejected text; add others")

    def training_index(self, number: int, seed: int) -> int:
        """Which of `train` comes as number `number` of the run."""
        return index_in_order(number, len(self.train), seed)


def _preference(
    row: Any, where: str, rating_range: Sequence[float] | None, *, first: Preference | None
) -> Preference:
    names = _text_columns(row, where)
    texts = tuple(_text(name, row[name], where) for name in names)
    if first is not None and len(first.texts) != len(texts):
        kinds = {1: "a rating", 2: "a pair"}
        this, that = kinds[len(texts)], kinds[len(first.texts)]
        raise InputError(f"{where}: is {this}, but {first.where} is {that}; all rows must be of one kind")
    prompt = row.get("prompt")
    prompt = None if prompt is None or prompt == "" else checked_prompt(prompt, where)
    if names == SIDES:
        if texts[0] == texts[1]:
            raise InputError(f"{where}: chosen and rejected are the same text; drop the row")
        margin = row.get("margin")
        return Preference(where, prompt, texts, 0.0 if margin is None else _number("margin", margin, where))
    rating = _number("rating", row["rating"], where)
    if rating_range is not None and not rating_range[0] <= rating <= rating_range[1]:
        low, high = rating_range
        raise InputError(f"{where}: the rating {rating:g} is outside rating_range, {low:g} to {high:g}")
    return Preference(where, prompt, texts, rating)


def _text_columns(row: Any, where: str) -> tuple[str, ...]:
    """The columns of a row that hold its texts."""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise InputError(
            f"{where}: expected an object of chosen and rejected, or text and rating, got {kind}"
        )
    found = {*SIDES, "text", "completion", "rating"} & row.keys()
    for names in (SIDES, ("text",), ("completion",)):
        if found == {*names, *(() if names == SIDES else ("rating",))}:
            return names
    has = ", ".join(map(str, row)) or "no columns"
    raise InputError(f"{where}: has {has}; needs chosen and rejected, or text (or completion) and rating")


def _text(name: str, value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "assistant" else value
    if not isinstance(value, str):
        kind, fix = type(value).__name__, "; earlier turns are the prompt" if isinstance(value, list) else ""
        raise InputError(f"{where}: {name} must be text or one assistant's message, got {kind}{fix}")
    if not value.strip():
        raise InputError(f"{where}: {name} is empty; give it text or drop the row")
    return checked_text(value, where)


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} must be a finite number, got {str(value)[:40]!r}")
    return float(value)

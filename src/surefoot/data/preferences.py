"""Preferences: what reward models and DPO learn from, pairs of texts or texts with ratings."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from surefoot.data.rows import SplitRows, checked_prompt, checked_text
from surefoot.errors import InputError
from surefoot.types import Preference

SIDES = ("chosen", "rejected")


class PreferenceDataset(SplitRows[Preference]):
    """Pairs of a chosen and a rejected text, or rated texts, split into `train` and `held_out`.

    `data` is a JSONL file, a list or a `datasets.Dataset` of rows `{"prompt"?, "chosen", "rejected",
    "margin"?}` or `{"prompt"?, "text" or "completion", "rating"}`; other columns are ignored. Texts are
    strings, or lists of one assistant's message. `held_out` is the fraction kept for evaluation, by a hash of
    the prompt, or without one of the texts (`data/rows.py:split`). Raises InputError, naming the line, for
    unusable rows, and for rows of two kinds or training rows that are all alike.
    """

    what = "preferences"

    def __init__(self, data: Any, *, held_out: float = 0.1, rating_range: Sequence[float] | None = None):
        parse = functools.partial(_preference, rating_range)
        # Rows of one prompt stay together, or without one those of the same texts.
        super().__init__(data, "data", parse, lambda row: row.prompt or sorted(row.texts), held_out)
        self.of_pairs = len(self.train[0].texts) == 2
        few = f"{self.source}: all {len(self.train)}"
        if not self.of_pairs and len({row.label for row in self.train}) == 1:
            raise InputError(f"{few} ratings to train on are {self.train[0].label:g}; add texts with others")
        if self.of_pairs and len({(row.texts, row.label) for row in self.train}) == 1:
            raise InputError(f"{few} pairs to train on have the same chosen and rejected text; add others")


def _preference(limits: Sequence[float] | None, row: Any, where: str, first: Preference | None) -> Preference:
    names = _text_columns(row, where)
    texts = tuple(_text(name, row[name], where) for name in names)
    if first is not None and len(first.texts) != len(texts):
        kinds = {1: "a rating", 2: "a pair"}
        this, that = kinds[len(texts)], kinds[len(first.texts)]
        raise InputError(f"{where}: is {this}, but {first.where} is {that}; all rows must be of one kind")
    prompt = row.get("prompt")
    prompt = None if prompt is None or prompt == "" else checked_prompt(prompt, where)
    if row.get("tools") and isinstance(prompt, list):
        raise InputError(f"{where}: prompts of preferences take no tools; drop that column")
    if names == SIDES:
        if texts[0] == texts[1]:
            raise InputError(f"{where}: chosen and rejected are the same text; drop the row")
        margin = row.get("margin")
        return Preference(where, prompt, texts, 0.0 if margin is None else _number("margin", margin, where))
    rating = _number("rating", row["rating"], where)
    if limits is not None and not limits[0] <= rating <= limits[1]:
        low, high = limits
        raise InputError(f"{where}: the rating {rating:g} is outside rating_range, {low:g} to {high:g}")
    return Preference(where, prompt, texts, rating)


def _text_columns(row: Any, where: str) -> tuple[str, ...]:
    """The columns of a row that hold its texts."""
    if not isinstance(row, Mapping):
        needed = "an object of chosen and rejected, or text and rating"
        raise InputError(f"{where}: expected {needed}, got {type(row).__name__}")
    found = {*SIDES, "text", "completion", "rating"} & row.keys()
    for names in (SIDES, ("text",), ("completion",)):
        if found == {*names, *(() if names == SIDES else ("rating",))}:
            return names
    has = ", ".join(map(str, row)) or "no columns"
    raise InputError(f"{where}: has {has}; needs chosen and rejected, or text (or completion) and rating")


def _text(name: str, value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "assistant" else value
    fix = "; give one assistant's message; earlier turns are the prompt" if isinstance(value, list) else ""
    return checked_text(value, where, name, fix)


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} must be a finite number, got {str(value)[:40]!r}")
    return float(value)

"""People's preferences of texts: what a reward model learns from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.envs.text import checked_prompt, checked_text, hash_fraction, read_rows, shuffled
from surefoot.errors import InputError
from surefoot.types import Preference

SIDES = ("chosen", "rejected")


class PreferenceDataset:
    """Pairs of a better and a worse text, or texts with ratings, all of one kind, some of them held out.

    `data` is a JSONL file, a list or a `datasets.Dataset` of rows `{"prompt"?, "chosen", "rejected", "margin"?}` or
    `{"prompt"?, "text" or "completion", "rating"}`; other columns are left alone. Texts are strings, or lists of one
    assistant's message. `held_out` is the fraction kept for evaluation, chosen by a hash of the prompt, where there is one,
    so that no prompt is on both sides. Raises InputError, naming the line, for rows nothing can be learned from, and for
    data too few to split.
    """

    def __init__(self, data: Any, *, held_out: float = 0.1, rating_range: Sequence[float] | None = None):
        preferences: list[Preference] = []
        for where, row in read_rows(data, "data"):
            preferences.append(
                _preference(row, where, rating_range, like=preferences[0] if preferences else None)
            )
        self.of_pairs = bool(preferences) and len(preferences[0].texts) == 2
        is_held_out = [hash_fraction(_together(preference)) < held_out for preference in preferences]
        self.train = [one for one, held in zip(preferences, is_held_out, strict=True) if not held]
        self.held_out = [one for one, held in zip(preferences, is_held_out, strict=True) if held]
        place = data if isinstance(data, (str, Path)) else "data"
        for name, part in (("to train on", self.train), ("held out", self.held_out)):
            if (part is self.train or held_out) and len(part) < 2:
                raise InputError(
                    f"{place}: of {len(preferences)} preferences {len(part)} are {name} and two are needed at least; give more, "
                    "or another held_out (0: none); those of one prompt stay together"
                )
            if not self.of_pairs and part and len({one.label for one in part}) == 1:
                raise InputError(
                    f"{place}: all {len(part)} preferences {name} have the rating {part[0].label:g}, which says nothing; give "
                    "texts of unlike ratings"
                )

        if self.of_pairs and len({(one.texts, one.label) for one in self.train}) == 1:
            raise InputError(
                f"{place}: all {len(self.train)} preferences to train on prefer the same text to the same other one, whatever "
                "the prompt; add pairs the other way round, or of other texts"
            )

    def training_index(self, number: int, seed: int) -> int:
        """Which of `train` comes as number `number` of the run: every epoch has its own order."""
        epoch, position = divmod(number, len(self.train))
        return shuffled(len(self.train), seed, epoch)[position]


def _together(preference: Preference) -> str:
    """The same for preferences that must not be torn apart."""
    return json.dumps(preference.prompt or sorted(preference.texts), default=str)


def _preference(
    row: Any, where: str, rating_range: Sequence[float] | None, *, like: Preference | None
) -> Preference:
    names = _names(row, where)
    texts = tuple(_text(name, row[name], where) for name in names)
    if like is not None and len(like.texts) != len(texts):
        kinds = {1: "a rating", 2: "a pair"}
        raise InputError(
            f"{where}: is {kinds[len(texts)]}, but {like.where} is {kinds[len(like.texts)]}; a file holds one kind"
        )
    prompt = row.get("prompt")
    prompt = None if prompt is None or prompt == "" else checked_prompt(prompt, where)
    if names == SIDES:
        if texts[0] == texts[1]:
            raise InputError(
                f"{where}: chosen and rejected are the same text, which says nothing; drop the row"
            )
        margin = row.get("margin")
        return Preference(where, prompt, texts, 0.0 if margin is None else _number("margin", margin, where))
    rating = _number("rating", row["rating"], where)
    if rating_range is not None and not rating_range[0] <= rating <= rating_range[1]:
        raise InputError(
            f"{where}: the rating {rating:g} is outside rating_range, {rating_range[0]:g} to {rating_range[1]:g}"
        )
    return Preference(where, prompt, texts, rating)


def _names(row: Any, where: str) -> tuple[str, ...]:
    """The columns of a row that hold its texts."""
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: expected an object with chosen and rejected, or text and rating, got {type(row).__name__}"
        )
    found = {*SIDES, "text", "completion", "rating"} & row.keys()
    for names in (SIDES, ("text",), ("completion",)):
        if found == {*names, *(() if names == SIDES else ("rating",))}:
            return names
    has = ", ".join(map(str, row)) or "nothing"
    raise InputError(
        f"{where}: has {has}; chosen and rejected, or text (or completion) and rating, are needed"
    )


def _text(name: str, value: Any, where: str) -> str:
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], Mapping)
        and value[0].get("role") == "assistant"
    ):
        value = value[0].get("content")
    if not isinstance(value, str):
        mend = "; of a chat, the turns before the answer are the prompt" if isinstance(value, list) else ""
        raise InputError(
            f"{where}: {name} is text or one assistant's message, got {type(value).__name__}{mend}"
        )
    if not value.strip():
        raise InputError(f"{where}: {name} is empty; give it text or drop the row")
    return checked_text(value, where)


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} is a finite number, got {str(value)[:40]!r}")
    return float(value)

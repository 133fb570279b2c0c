"""Pairs and ratings as they are read: what is kept, what is held out, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from surefoot.data.preferences import PreferenceDataset
from tests.inputs import refusal

CHAT = [{"role": "user", "content": "who"}]
PAIR: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
RATING: dict[str, Any] = {"text": "a", "rating": 1}


def test_pairs_and_ratings_are_read():
    rows = [PAIR, {"chosen": "x", "rejected": "y", "margin": 2, "id": 7}, {**PAIR, "prompt": CHAT, "margin": None}]
    pairs = PreferenceDataset(rows, held_out=0.0)
    assert pairs.of_pairs and not pairs.held_out
    assert [(row.prompt, row.texts, row.label) for row in pairs.train] == [
        ("a", ("b", "c"), 0.0),
        (None, ("x", "y"), 2.0),
        (CHAT, ("b", "c"), 0.0),
    ]
    message = [{"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "completion": message, "rating": -1.5}, RATING]
    ratings = PreferenceDataset(rows, held_out=0.0, rating_range=[-4, 4])
    assert not ratings.of_pairs and [(row.texts, row.label) for row in ratings.train] == [(("b",), -1.5), (("a",), 1.0)]
    assert ratings.train[1].record() == {"prompt": None, "text": "a", "rating": 1.0, "scores": None}
    assert pairs.train[0].record() == {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.0, "scores": None}


def test_tools_are_refused_where_no_reward_model_would_see_them():
    rows = [{**PAIR, "prompt": "a", "tools": [{}]}, {**PAIR, "prompt": CHAT, "tools": [{}]}]
    refusal(lambda: PreferenceDataset(rows, held_out=0.0), "data, row 2", "tools")


def test_what_is_held_out_follows_from_the_prompt():
    rows = [{"prompt": f"p{n // 3}", "chosen": f"b{n}", "rejected": "c"} for n in range(90)]
    data, again = PreferenceDataset(rows, held_out=0.3), PreferenceDataset(rows[::-1], held_out=0.3)
    prompts = [{row.prompt for row in part} for part in (data.train, data.held_out)]
    assert not prompts[0] & prompts[1] and len(data.held_out) % 3 == 0 and data.held_out
    assert {row.texts for row in data.held_out} == {row.texts for row in again.held_out}
    # The same two texts with the preference turned over are about the same thing.
    texts = [{"chosen": a, "rejected": b} for n in range(60) for a, b in ((f"b{n}", "c"), ("c", f"b{n}"))]
    assert len(PreferenceDataset(texts, held_out=0.5).held_out) % 2 == 0


@pytest.mark.parametrize(
    ("second", "names"),
    [
        ({**PAIR, "rejected": "b"}, ("chosen", "rejected", "same text")),
        ({**PAIR, "margin": "1"}, ("margin", "'1'")),
        ({**PAIR, "chosen": " "}, ("chosen is empty",)),
        ({**PAIR, "chosen": 3}, ("chosen", "got int")),
        ({**PAIR, "chosen": CHAT}, ("chosen", "got list")),
        ({**PAIR, "prompt": 3}, ("prompt", "got int")),
        ({"prompt": "a", "chosen": "b"}, ("has prompt, chosen",)),
        ({**PAIR, "rating": 1}, ("has prompt, chosen, rejected, rating",)),
        ({}, ("has no columns",)),
        ("b", ("got str",)),
        (RATING, ("is a rating", "data.jsonl, line 1", "one kind")),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_refused_with_its_line(tmp_path, monkeypatch, second, names):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(second)}\n")
    refusal(lambda: PreferenceDataset("data.jsonl", held_out=0.0), "data.jsonl, line 3", *names)


@pytest.mark.parametrize(
    ("rows", "settings", "names"),
    [
        ([RATING, {"text": "b", "rating": 9}], {"rating_range": [-4, 4]}, ("data, row 2", "rating 9", "rating_range")),
        ([RATING, {"text": "b", "rating": True}], {}, ("data, row 2", "rating", "'True'")),
        ([RATING, {"text": "b", "rating": float("nan")}], {}, ("data, row 2", "rating", "'nan'")),
        ([RATING, {"text": "b", "rating": 1.0}], {"held_out": 0.0}, ("data", "2 ratings", "are 1")),
        ([RATING], {}, ("data", "1 ratings", "are 1")),
        ([], {}, ("data", "no preferences")),
        ([PAIR] * 9, {"held_out": 0.5}, ("data", "9 pairs", "same chosen")),
        ([{**PAIR, "prompt": f"{n}"} for n in range(4)], {"held_out": 0.01}, ("data", "3 pairs", "same chosen")),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(rows, settings, names):
    refusal(lambda: PreferenceDataset(rows, **settings), *names)

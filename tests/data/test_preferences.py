"""Pairs and ratings as they are read: what is kept, what is held out, and what is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surefoot.data.preferences import PreferenceDataset
from surefoot.errors import InputError

CHAT = [{"role": "user", "content": "who"}]
PAIR: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
RATING: dict[str, Any] = {"text": "a", "rating": 1}


def test_pairs_and_ratings_are_read():
    data = PreferenceDataset(
        [PAIR, {"chosen": "x", "rejected": "y", "margin": 2, "id": 7}, {**PAIR, "prompt": CHAT, "margin": None}], held_out=0.0
    )
    assert data.of_pairs and not data.held_out
    assert [(one.prompt, one.texts, one.label) for one in data.train] == [
        ("a", ("b", "c"), 0.0),
        (None, ("x", "y"), 2.0),
        (CHAT, ("b", "c"), 0.0),
    ]
    answer = [{"role": "assistant", "content": "b"}]
    rated = PreferenceDataset(
        [{"prompt": "a", "completion": answer, "rating": -1.5}, RATING], held_out=0.0, rating_range=[-4, 4]
    )
    assert not rated.of_pairs and [(one.texts, one.label) for one in rated.train] == [(("b",), -1.5), (("a",), 1.0)]
    assert rated.train[1].record() == {"prompt": None, "text": "a", "rating": 1.0, "scores": None}
    assert data.train[0].record() == {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.0, "scores": None}


def test_what_is_held_out_follows_from_the_prompt():
    rows = [{"prompt": f"p{n // 3}", "chosen": f"b{n}", "rejected": "c"} for n in range(90)]
    data, again = PreferenceDataset(rows, held_out=0.3), PreferenceDataset(rows[::-1], held_out=0.3)
    prompts = [{one.prompt for one in part} for part in (data.train, data.held_out)]
    assert not prompts[0] & prompts[1] and len(data.held_out) % 3 == 0 and data.held_out
    assert {one.texts for one in data.held_out} == {one.texts for one in again.held_out}
    # The same two texts with the preference turned over are about the same thing.
    texts = [{"chosen": a, "rejected": b} for n in range(60) for a, b in ((f"b{n}", "c"), ("c", f"b{n}"))]
    assert len(PreferenceDataset(texts, held_out=0.5).held_out) % 2 == 0


def test_every_epoch_has_an_order_of_its_own():
    data = PreferenceDataset([{"text": f"t{n}", "rating": n} for n in range(20)], held_out=0.0)
    orders = [[data.training_index(20 * epoch + n, seed=1) for n in range(20)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20)) and orders[0] != orders[1]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({**PAIR, "rejected": "b"}, "chosen and rejected are the same text, which says nothing; drop the row"),
        ({**PAIR, "margin": "1"}, "margin is a finite number, got '1'"),
        ({**PAIR, "chosen": " "}, "chosen is empty; give it text or drop the row"),
        ({**PAIR, "chosen": 3}, "chosen is text or one assistant's message, got int"),
        ({**PAIR, "chosen": CHAT}, "chosen is text or one assistant's message, got list; of a chat, the turns before"),
        ({**PAIR, "prompt": 3}, "a prompt is a string or a list of {role, content} messages, got int"),
        ({"prompt": "a", "chosen": "b"}, "has prompt, chosen; chosen and rejected, or text (or completion) and rating, are"),
        ({**PAIR, "rating": 1}, "has prompt, chosen, rejected, rating; chosen and rejected, or text"),
        ({}, "has nothing; chosen and rejected, or"),
        ("b", "expected an object with chosen and rejected, or text and rating, got str"),
        (RATING, "is a rating, but FILE, line 1 is a pair; a file holds one kind"),
    ],
)
def test_a_row_that_says_nothing_is_refused_with_its_line(tmp_path, second, said):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(second)}\n")
    with pytest.raises(InputError) as caught:
        PreferenceDataset(file, held_out=0.0)
    assert str(caught.value).startswith(f"{file}, line 3: " + said.replace("FILE", str(file)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([RATING, {"text": "b", "rating": 9}], {"rating_range": [-4, 4]}, "data, row 2: the rating 9 is outside rating_range"),
        ([RATING, {"text": "b", "rating": True}], {}, "data, row 2: rating is a finite number, got 'True'"),
        ([RATING, {"text": "b", "rating": float("nan")}], {}, "data, row 2: rating is a finite number, got 'nan'"),
        ([RATING, {"text": "b", "rating": 1.0}], {"held_out": 0.0}, "data: all 2 preferences to train on have the rating 1"),
        ([], {}, "data: of 0 preferences 0 are to train on and two are needed at least"),
        ([PAIR], {"held_out": 0.0}, "data: of 1 preferences 1 are to train on and two are needed at least"),
        ([PAIR] * 9, {"held_out": 0.5}, "data: of 9 preferences 0 are to train on"),
        ([{**PAIR, "prompt": f"{n}"} for n in range(4)], {"held_out": 0.01}, "data: of 4 preferences 0 are held out and two"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(rows, settings, said):
    with pytest.raises(InputError) as caught:
        PreferenceDataset(rows, **settings)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)

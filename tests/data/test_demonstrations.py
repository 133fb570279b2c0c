"""Reading examples: the three kinds, and files that must be refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surefoot.data.demonstrations import Demonstrations
from surefoot.errors import InputError
from tests.inputs import Rows

TEXT, PAIR = {"text": "the film"}, {"prompt": "the", "completion": " film"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the end"}]


def refusal(data: object, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        Demonstrations(data, **{"held_out": 0.0, **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row", [TEXT, PAIR, {"messages": MESSAGES}], ids=["text", "pair", "chat"])
def test_a_file_a_list_and_a_dataset_are_read_alike(tmp_path, row):
    file = tmp_path / "d.jsonl"
    file.write_text(f"{json.dumps(row | {'id': 7})}\n\n{json.dumps(row)}\n")
    from_file = Demonstrations(file, held_out=0.0).train
    assert [example.contents for example in from_file] == [row, row]
    assert from_file[1].where == f"{file}, line 3"  # the blank one counts
    for data in ([row, row], Rows([row, row])):
        assert [example.contents for example in Demonstrations(data, held_out=0.0).train] == [row, row]


def test_plain_strings_are_texts():
    assert [example.contents for example in Demonstrations(["the film"], held_out=0.0).train] == [TEXT]


def test_a_column_that_stands_for_another_is_not_itself_besides():
    data = Demonstrations([{"prompt": "a film", "rating": 3.0}], held_out=0.0, columns={"text": "prompt"})
    assert data.train[0].contents == {"text": "a film"}
    with pytest.raises(InputError, match="has text; one of"):
        Demonstrations(["a film"], held_out=0.0, columns={"prompt": "text"})


def test_columns_may_have_other_names():
    data = Demonstrations([{"q": "the", "a": " film"}], held_out=0.0, columns={"prompt": "q", "completion": "a"})
    assert data.train[0].contents == PAIR


def test_what_is_held_out_depends_on_the_contents_alone():
    rows = [{"text": f"film {number}"} for number in range(200)]
    data = Demonstrations(rows, held_out=0.3)
    held = {example.contents["text"] for example in data.held_out}
    assert 40 < len(held) < 80 and len(data.train) + len(held) == 200
    again = Demonstrations(rows[::-1][:100], held_out=0.3)
    assert {example.contents["text"] for example in again.held_out} == held & {row["text"] for row in rows[100:]}


def test_one_example_at_least_is_held_out():
    rows = ["the film", "a band", "her dog"]
    data = Demonstrations(rows, held_out=1e-6)
    assert (len(data.train), len(data.held_out)) == (2, 1)
    assert [e.contents for e in Demonstrations(rows[::-1], held_out=1e-6).held_out] == [e.contents for e in data.held_out]
    assert not Demonstrations(rows, held_out=0.0).held_out


def test_a_text_that_most_rows_have_is_not_held_out_for_want_of_another():
    for rows in (["the film was good"], ["the film was good"] * 20, ["good one"] * 99 + ["rare one"]):
        data = Demonstrations(rows, held_out=1e-6)
        assert len(data.train) >= len(rows) - 1 and len(data.train) + len(data.held_out) == len(rows)
    said = "data: no examples to train on: all 1 were held out; lower held_out (0: none) or give more"
    assert refusal(["the film"], held_out=0.999999) == said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([TEXT, PAIR], "data, row 2: has prompt and completion, but data, row 1 has text; a file holds one kind"),
        ([PAIR, "the"], "data, row 2: has text, but data, row 1 has prompt and completion; a file holds one kind"),
        ([TEXT | PAIR], "data, row 1: has text, prompt, completion; one of text, prompt and completion, or messages is needed"),
        ([{"prompt": "the"}], "data, row 1: has prompt; one of text, prompt and completion, or messages is needed"),
        ([{}], "data, row 1: has nothing; one of text"),
        ([7], "data, row 1: expected an object with text, prompt and completion, or messages, got int"),
        ([{"text": 7}], "data, row 1: text is text, got int"),
        ([TEXT, {"text": " \n"}], "data, row 2: the text is empty; give it text or drop the row"),
        ([{"prompt": "", "completion": "x"}], "data, row 1: the prompt is empty"),
        ([{"prompt": "x", "completion": ""}], "data, row 1: the completion is empty"),
        ([{"prompt": "x", "completion": None}], "data, row 1: completion is text, got NoneType"),
        (
            [{"prompt": MESSAGES[:1], "completion": "x"}],
            "data, row 1: prompt is text, got list; a chat goes in whole, as messages",
        ),
        ([{"messages": "hi"}], "data, row 1: messages is a list of {role, content}, got str"),
        ([{"messages": []}], "data, row 1: the prompt has no messages"),
        ([{"messages": MESSAGES[:1]}], "data, row 1: no assistant's message to learn; give the chat one or drop it"),
        ([{"messages": [{"role": "assistant"}]}], "data, row 1: a prompt is a string or a list of {role, content} messages"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "data, row 1: a message's content is text, got NoneType"),
        ([{"text": "\ud800"}], "data, row 1: half a surrogate pair is no character"),
        ([], "data: no examples there; one is needed at least"),
        ({"text": ["a"]}, "data: a dict is not a list of rows"),
        (7, "data: expected a list, a JSONL file or a datasets.Dataset, got int"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_one_line_with_their_place(rows, said):
    assert refusal(rows).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', "d.jsonl, line 2: not JSON; one object or string per line is needed"),
        (b'{"text": "a"}\n\xff\n', "d.jsonl, line 2: not UTF-8"),
        (
            b'{"text": "a"}\n\n{"prompt": "a", "completion": "b"}\n',
            "d.jsonl, line 3: has prompt and completion, but d.jsonl, line 1",
        ),
        (b"\n", "d.jsonl: no examples there; one is needed at least"),
    ],
)
def test_a_bad_file_is_one_line_with_its_line(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_bytes(content)
    assert refusal("d.jsonl").startswith(said)
    assert refusal("no.jsonl").startswith("data: no file no.jsonl; ")


def test_holding_out_everything_is_refused():
    assert refusal(["a"], held_out=0.9999999).startswith("data: no examples to train on: all 1 were held out; lower held_out")

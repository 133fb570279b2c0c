"""Reading demonstrations: the three kinds, and rows that must be refused with their line."""

import json

import pytest

from surefoot.data.demonstrations import Demonstrations
from tests.inputs import Rows, refusal

TEXT, PAIR = {"text": "the film"}, {"prompt": "the", "completion": " film"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the end"}]


@pytest.mark.parametrize("row", [TEXT, PAIR, {"messages": MESSAGES}], ids=["text", "pair", "chat"])
def test_a_file_a_list_and_a_dataset_are_read_alike(tmp_path, row):
    file = tmp_path / "d.jsonl"
    file.write_text(f"{json.dumps(row | {'id': 7})}\n\n{json.dumps(row)}\n")
    from_file = Demonstrations(file, held_out=0.0).train
    assert [example.contents for example in from_file] == [row, row]
    assert from_file[1].where == f"{file}, line 3"  # the blank one counts
    for data in ([row, row], Rows([row, row])):
        assert [example.contents for example in Demonstrations(data, held_out=0.0).train] == [row, row]


def test_plain_strings_are_texts_and_columns_may_have_other_names():
    assert [example.contents for example in Demonstrations(["the film"], held_out=0.0).train] == [TEXT]
    data = Demonstrations([{"q": "the", "a": " film"}], held_out=0.0, columns={"prompt": "q", "completion": "a"})
    assert data.train[0].contents == PAIR
    # A column that stands for another does not also stand for itself.
    data = Demonstrations([{"prompt": "a film", "rating": 3.0}], held_out=0.0, columns={"text": "prompt"})
    assert data.train[0].contents == {"text": "a film"}
    refusal(lambda: Demonstrations(["a film"], columns={"prompt": "text"}), "data, row 1", "has text")


def test_a_chat_brings_its_tools():
    rows = [{"messages": MESSAGES, "tools": tools} for tools in ([{"name": "add"}], None, [])]
    assert [example.tools for example in Demonstrations(rows, held_out=0.0).train] == [[{"name": "add"}], None, []]


def test_what_is_held_out_depends_on_the_contents_alone():
    rows = [{"text": f"film {number}"} for number in range(200)]
    held, again = ({e.contents["text"] for e in Demonstrations(part, held_out=0.3).held_out} for part in (rows, rows[:99:-1]))
    assert 40 < len(held) < 80 and again == held & {row["text"] for row in rows[100:]}


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([TEXT, PAIR], ("data, row 2", "prompt and completion", "data, row 1", "one kind")),
        ([PAIR, "the"], ("data, row 2", "has text", "data, row 1", "one kind")),
        ([TEXT | PAIR], ("data, row 1", "has text, prompt, completion")),
        ([{"prompt": "the"}], ("data, row 1", "has prompt")),
        ([{}], ("data, row 1", "has no columns")),
        ([7], ("data, row 1", "got int")),
        ([{"text": 7}], ("data, row 1", "text", "got int")),
        ([TEXT, {"text": " \n"}], ("data, row 2", "text is empty")),
        ([{"prompt": "", "completion": "x"}], ("data, row 1", "prompt is empty")),
        ([{"prompt": "x", "completion": ""}], ("data, row 1", "completion is empty")),
        ([{"prompt": "x", "completion": None}], ("data, row 1", "completion", "NoneType")),
        ([{"prompt": MESSAGES[:1], "completion": "x"}], ("data, row 1", "prompt", "got list", "messages")),
        ([{"messages": "hi"}], ("data, row 1", "messages", "got str")),
        ([{"messages": []}], ("data, row 1", "no messages")),
        ([{"messages": MESSAGES[:1]}], ("data, row 1", "no assistant's message")),
        ([{"text": "\ud800"}], ("data, row 1", "surrogate")),
        ([], ("data", "no demonstrations")),
        ({"text": ["a"]}, ("data", "a dict")),
    ],
)
def test_rows_that_cannot_be_learned_from_are_one_line_with_their_place(rows, names):
    refusal(lambda: Demonstrations(rows, held_out=0.0), *names)

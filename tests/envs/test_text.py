"""Prompts as users have them: lists, chats, files, data sets; and what is wrong with them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest

from surefoot.envs import text as text_module
from surefoot.envs.text import TextTask, checked_prompt
from surefoot.errors import InputError
from tests.inputs import Rows

MANY = [f"prompt number {number}" for number in range(400)]


def reward(prompts, completions, **columns):
    return [0.0] * len(completions)


def refusal(prompts: object, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        TextTask(prompts, reward, **settings)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    return message


@pytest.fixture
def jsonl(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "p.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
KINDS = {
    "list of strings": ["one", "two"],
    "tuple": ("one", "two"),
    "generator": (text for text in ("one", "two")),
    "numpy array": numpy.array(["one", "two"]),
    "list of dicts": [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}],
    "data set": Rows([{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}]),
    "chats": [CHAT, [{"role": "user", "content": "Hello"}]],
    "dicts of chats": [{"prompt": CHAT, "n": 1}, {"prompt": CHAT, "n": 2}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_in_many_kinds(kind):
    task = TextTask(KINDS[kind], reward, held_out=0)
    assert len(task.train) == 2 and task.held_out == []
    assert task.train[0].prompt == (CHAT if "chats" in kind else "one")
    assert task.train[1].columns == ({"n": 2} if "dicts" in kind or kind == "data set" else {})


def test_a_jsonl_file_holds_strings_chats_and_rows(jsonl):
    lines = [json.dumps("eins"), "", json.dumps({"prompt": "zwei", "n": 2}), "   ", json.dumps(CHAT, ensure_ascii=False)]
    path = jsonl("\r\n".join(lines))
    for source in (path, str(path)):
        examples = TextTask(source, reward, held_out=0).train
        assert [e.prompt for e in examples] == ["eins", "zwei", CHAT]
        assert examples[1].columns == {"n": 2}


def test_a_byte_order_mark_is_no_part_of_the_data(jsonl):
    # Windows editors put one there.
    assert TextTask(jsonl(b'\xef\xbb\xbf{"prompt": "one"}\n'), reward, held_out=0).train[0].prompt == "one"


def test_the_prompt_column_can_have_another_name(jsonl):
    path = jsonl('{"question": "why", "prompt": "not this", "n": 1}')
    example = TextTask(path, reward, prompt_column="question", held_out=0).train[0]
    assert example.prompt == "why" and example.columns == {"prompt": "not this", "n": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "one"}\n{"prompt": "tw', "p.jsonl, line 2: not JSON"),
        ('"one"\n\n\nnot json', "p.jsonl, line 4: not JSON"),  # blank lines are counted
        ("prompt,answer\none,1", "p.jsonl, line 1: not JSON"),
        ('{"prompt": "one"}\n{"promt": "two", "n": 1}', "p.jsonl, line 2: no column 'prompt'; it has promt, n"),
        ('{"prompt": "one"}\n{}', "p.jsonl, line 2: no column 'prompt'; it has none"),
        (b'"one"\n"\xff\xfe"\n', "p.jsonl, line 2: not UTF-8; save the file as UTF-8"),
        ('"one"'.encode("utf-16"), "p.jsonl, line 1: not UTF-8"),
        (b"\x1f\x8b\x08\x00", "p.jsonl, line 1: not UTF-8"),  # a .gz
        ("", "p.jsonl: no prompts there"),
        ("\n  \n", "p.jsonl: no prompts there"),
        ('"one"\n""', "p.jsonl, line 2: the prompt is empty"),
        ('{"prompt": "  \\n"}', "p.jsonl, line 1: the prompt is empty"),
        ("5", "p.jsonl, line 1: a prompt is a string or a list of {role, content} messages, got int"),
        ("null", "p.jsonl, line 1: a prompt is a string or a list of {role, content} messages, got NoneType"),
        ('{"prompt": null}', "p.jsonl, line 1: a prompt is a string or a list of {role, content} messages, got NoneType"),
        ('{"prompt": ["one", "two"]}', "p.jsonl, line 1: a prompt is a string or a list of {role, content} messages, got list"),
        ('{"prompt": {"role": "user", "content": "x"}}', "p.jsonl, line 1: a prompt is a string or a list of"),
        ('{"prompt": [{"role": "user"}]}', "p.jsonl, line 1: a prompt is a string or a list of"),
        ('{"prompt": []}', "p.jsonl, line 1: the prompt has no messages"),
        ('{"prompt": [{"role": "user", "content": null}]}', "p.jsonl, line 1: a message's content is text, got NoneType"),
        ('{"prompt": [{"role": 1, "content": "x"}]}', "p.jsonl, line 1: a message's role is text, got int"),
        ('"half \\ud83d an emoji"', "p.jsonl, line 1: half a surrogate pair is no character"),
        ('{"prompt": [{"role": "user", "content": "\\ud83d"}]}', "p.jsonl, line 1: half a surrogate pair"),
        ('{"prompt": "one", "completions": 3}', "p.jsonl, line 1: the reward function gets its own 'completions'"),
        ("[" * 100_000, "p.jsonl, line 1: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(jsonl, content, said):
    assert f"{said}" in refusal(jsonl(content))


def test_a_huge_line_is_refused_and_not_read_into_memory(jsonl, monkeypatch):
    sizes = []
    real = text_module._parse_line
    monkeypatch.setattr(text_module, "_parse_line", lambda line, where: (sizes.append(len(line)), real(line, where))[1])
    path = jsonl(b'"one"\n')
    with path.open("ab") as file:
        file.truncate(1_000_000_000)  # a sparse file: a gigabyte without a line break
    started = time.perf_counter()
    assert "p.jsonl, line 2: longer than 16,000,000 bytes" in refusal(path)
    assert max(sizes) <= 16_000_001 and time.perf_counter() - started < 5


def test_a_line_just_short_enough_is_read(jsonl, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_LINE_BYTES", 8)
    assert TextTask(jsonl('"12345"\n"6789"'), reward, held_out=0).train[0].prompt == "12345"
    assert "line 1: longer than 8 bytes" in refusal(jsonl('"1234567"'))


@pytest.mark.parametrize("name", ["no.jsonl", "no/such/folder.jsonl", "a\0b"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    message = refusal(str(tmp_path / name))
    assert name in message and ("no file" in message or "cannot be read" in message)


def test_a_folder_is_no_file(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


class Frame:
    """What a pandas DataFrame does when it is iterated: give the names of its columns."""

    def iterrows(self):
        yield 0, {"prompt": "one"}

    def __iter__(self):
        return iter(["prompt", "answer"])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (5, "prompts: expected a list, a JSONL file or a datasets.Dataset, got int"),
        (None, "prompts: expected a list, a JSONL file or a datasets.Dataset, got NoneType"),
        (b"one", "prompts: expected a list, a JSONL file or a datasets.Dataset, got bytes"),
        ({"prompt": ["one", "two"]}, "prompts: a dict is not a list of rows"),
        ({"train": Rows([{"prompt": "one"}])}, "take one split of a DatasetDict"),
        (Frame(), "table.to_dict('records') of a DataFrame"),
        ({"one", "two"}, "prompts: a set has another order in every process"),
        (frozenset({"one"}), "prompts: a set has another order in every process"),
        ([], "prompts: no prompts there"),
        (Rows([{"text": "one"}]), "prompts, row 1: no column 'prompt'; it has text"),
        (["one", 2], "prompts, row 2: a prompt is a string or a list of {role, content} messages, got int"),
        (["one", b"two"], "prompts, row 2: a prompt is a string or a list of {role, content} messages, got bytes"),
        (["one", " "], "prompts, row 2: the prompt is empty"),
        ([{"prompt": "one", "prompts": 1}], "prompts, row 1: the reward function gets its own 'prompts'"),
        (["half \ud83d"], "prompts, row 1: half a surrogate pair"),
    ],
)
def test_prompts_of_no_usable_type_are_refused(prompts, said):
    assert said in refusal(prompts)


@pytest.mark.parametrize("held_out", [1, 1.0, 1.5, -0.1, math.nan, True])
def test_a_held_out_fraction_outside_0_to_1_is_refused(held_out):
    assert "held_out: expected a fraction from 0 to below 1" in refusal(MANY, held_out=held_out)


@pytest.mark.parametrize("held_out", [None, 5 + 1j, {"a": 1}, ["one", 2]])
def test_held_out_prompts_of_no_usable_type_are_refused(held_out):
    assert "held_out" in refusal(MANY, held_out=held_out)


@pytest.mark.parametrize("prompt_tokens", [0, -3, 2.5, "6"])
def test_a_senseless_number_of_prompt_tokens_is_refused(prompt_tokens):
    # A negative one would be taken for a slice from the end.
    assert "prompt_tokens: expected a whole number above 0" in refusal(MANY, prompt_tokens=prompt_tokens)


def test_a_chat_is_not_cut_to_its_first_tokens():
    # What is left of the template's text would be no chat any more.
    assert "prompt_tokens would cut the chat template's text" in refusal(MANY, chat=True, prompt_tokens=6)


@pytest.mark.parametrize("function", [None, "reward.py:reward", 0.5, [reward]])
def test_a_reward_that_cannot_be_called_is_refused(function):
    with pytest.raises(InputError, match="reward: expected a function of"):
        TextTask(MANY, function)


def test_a_metric_that_cannot_be_called_is_refused():
    with pytest.raises(InputError, match="metric: expected a function of"):
        TextTask(MANY, reward, metric="accuracy")


def test_all_prompts_held_out_is_refused_and_said():
    alone = [next(p for p in MANY if TextTask([p, "x"], reward, held_out=0.1).held_out)]
    assert "all 1 were held out; lower held_out or give more prompts" in refusal(alone, held_out=0.1)


def test_who_is_held_out_depends_on_the_text_alone():
    task = TextTask(MANY, reward, held_out=0.25)
    assert len(task.train) + len(task.held_out) == len(MANY) and 70 < len(task.held_out) < 130
    turned = TextTask(list(reversed(MANY))[:200], reward, held_out=0.25)
    held_out = {e.text for e in task.held_out}
    assert {e.text for e in turned.held_out} == held_out & set(MANY[200:])
    more = TextTask(MANY, reward, held_out=0.5)
    assert held_out < {e.text for e in more.held_out}


def test_equal_prompts_are_on_the_same_side():
    task = TextTask(MANY * 2, reward, held_out=0.3)
    assert not {e.text for e in task.train} & {e.text for e in task.held_out}


def test_held_out_prompts_can_be_given(jsonl):
    for own in (["a", "b"], jsonl('"a"\n"b"')):
        task = TextTask(["one"], reward, held_out=own)
        assert [e.prompt for e in task.held_out] == ["a", "b"] and [e.prompt for e in task.train] == ["one"]


def test_every_pass_plays_each_prompt_once_in_an_order_of_its_own():
    task = TextTask(MANY[:20], reward, held_out=0)
    passes = [[task.training_example(20 * n + i, seed=3).text for i in range(20)] for n in range(4)]
    assert all(sorted(one) == sorted(MANY[:20]) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_the_order_depends_on_seed_and_episode_alone():
    task, again = (TextTask(MANY, reward, held_out=0) for _ in range(2))
    there_and_back = [0, 900, 5, 1300, 5, 0]
    assert [task.training_example(n, seed=1).text for n in there_and_back] == [
        again.training_example(n, seed=1).text for n in there_and_back
    ]
    assert [task.training_example(n, seed=1) for n in range(9)] != [task.training_example(n, seed=2) for n in range(9)]


def test_the_callers_messages_are_not_shared():
    chat = [{"role": "user", "content": "Hello"}]
    prompt = checked_prompt(chat, "test")
    assert isinstance(prompt, list)
    prompt[0]["content"] = "changed"
    assert chat[0]["content"] == "Hello"


def test_columns_that_only_some_rows_have_are_kept_where_they_are():
    task = TextTask([{"prompt": "one", "n": 1}, {"prompt": "two"}, "three"], reward, held_out=0)
    assert Counter(tuple(e.columns) for e in task.train) == {("n",): 1, (): 2}

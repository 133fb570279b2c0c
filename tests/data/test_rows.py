"""Rows as users have them, in files, lists and data sets; what is held out of them, and their order."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from surefoot.data import rows as module
from surefoot.data.rows import checked_prompt, index_in_order, read_rows, split
from tests.inputs import Rows, refusal

MANY = [f"prompt number {number}" for number in range(400)]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


def checked(source: Any) -> list[Any]:
    return [checked_prompt(row, where) for where, row in read_rows(source, "prompts")]


def test_a_file_is_read_line_by_line_without_blank_ones_or_a_byte_order_mark(written):
    lines = [json.dumps("eins"), "", json.dumps({"n": 2}), "   ", json.dumps(CHAT, ensure_ascii=False)]
    path = written(b"\xef\xbb\xbf" + "\r\n".join(lines).encode(), "p.jsonl")
    expected = [("p.jsonl, line 1", "eins"), ("p.jsonl, line 3", {"n": 2}), ("p.jsonl, line 5", CHAT)]
    assert list(read_rows(str(path), "x")) == list(read_rows(path, "x")) == expected


def test_a_list_is_counted_by_rows():
    for source in (["a", "b"], ("a", "b"), iter(["a", "b"])):
        assert list(read_rows(source, "data")) == [("data, row 1", "a"), ("data, row 2", "b")]
    assert [row for _, row in read_rows(Rows([{"a": 1}]), "data")] == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('"one"\n{"prompt": "tw', ("line 2", "not JSON")),
        ('"one"\n\n\nnot json', ("line 4", "not JSON")),  # blank lines are counted
        ("[" * 100_000, ("line 1", "not JSON")),
        (b'"one"\n"\xff\xfe"\n', ("line 2", "not UTF-8")),
        (b"\x1f\x8b\x08\x00", ("line 1", "not UTF-8")),  # a .gz
        ('"one"\n""', ("line 2", "the prompt is empty")),
        ("5", ("line 1", "got int")),
        ('["one", "two"]', ("line 1", "got list")),
        ('{"role": "user", "content": "x"}', ("line 1", "got dict")),
        ('[{"role": "user"}]', ("line 1", "{role, content}")),
        ("[]", ("line 1", "no messages")),
        ('[{"role": "user", "content": null}]', ("line 1", "content", "NoneType")),
        ('[{"role": 1, "content": "x"}]', ("line 1", "role", "int")),
        ('"half \\ud83d an emoji"', ("line 1", "surrogate")),
        ('[{"role": "user", "content": "\\ud83d"}]', ("line 1", "surrogate")),
    ],
)
def test_a_bad_line_is_named_with_its_number(written, content, names):
    path = written(content, "p.jsonl")
    assert len(refusal(lambda: checked(path), "p.jsonl", *names)) < 250


def test_a_huge_line_is_refused_and_not_read_into_memory(written, monkeypatch):
    sizes = []
    real = module._parse_line
    monkeypatch.setattr(module, "_parse_line", lambda line, where: (sizes.append(len(line)), real(line, where))[1])
    path = written(b'"one"\n', "p.jsonl")
    with Path(path).open("ab") as file:
        file.truncate(1_000_000_000)  # a sparse file: a gigabyte without a line break
    started = time.perf_counter()
    refusal(lambda: checked(path), "line 2", "longer than 16,000,000 bytes")
    assert max(sizes) <= 16_000_001 and time.perf_counter() - started < 5
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 8)
    assert checked(written('"12345"\n"6789"', "p.jsonl")) == ["12345", "6789"]
    refusal(lambda: checked(written('"1234567"', "p.jsonl")), "line 1", "longer than 8 bytes")


def test_what_may_have_no_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 50)
    assert len(list(read_rows((str(i) for i in range(50)), "data"))) == 50
    assert len(list(read_rows(["one"] * 51, "data"))) == 51  # it says how many it has
    for endless in (itertools.repeat({"prompt": "one"}), (str(i) for i in itertools.count()), itertools.cycle(["one"])):
        refusal(lambda endless=endless: list(read_rows(endless, "data")), "data", "more than 50 rows", "islice")
    os.mkfifo(tmp_path / "rows.jsonl")  # which nobody writes into
    refusal(lambda: list(read_rows(tmp_path / "rows.jsonl", "data")), "data", "rows.jsonl", "pipe")


FRAME = type("Frame", (), {"iterrows": None, "__iter__": lambda self: iter(["prompt"])})()
NO_ROWS = {"data: no file no.jsonl": "no.jsonl", "no file no/such/folder.jsonl": "no/such/folder.jsonl", "got bytes": b"one"}
NO_ROWS |= {"cannot be read: Is a directory": ".", "got int": 5, "got NoneType": None, "a dict is not": {"prompt": ["one"]}}


@pytest.mark.parametrize(
    ("named", "source"), [*NO_ROWS.items(), ("", "a\0b"), ("data: a set", {"one"}), ("to_dict('records')", FRAME)]
)
def test_what_holds_no_rows_is_refused(tmp_path, monkeypatch, source, named):
    monkeypatch.chdir(tmp_path)
    refusal(lambda: list(read_rows(source, "data")), *filter(None, [named]))


def test_the_callers_messages_are_not_shared():
    prompt = checked_prompt(CHAT, "test")
    assert prompt == CHAT and prompt is not CHAT and prompt[0] is not CHAT[0]


def test_what_is_held_out_depends_on_the_key_alone():
    train, held_out = split(MANY, MANY, 0.25)
    assert sorted(train + held_out) == sorted(MANY) and 70 < len(held_out) < 130
    assert held_out == [key for key in MANY if key in held_out]  # their order stays
    fewer = MANY[::-1][:200]
    assert set(split(fewer, fewer, 0.25)[1]) == {*held_out} & {*fewer}  # more rows move none across
    assert {*held_out} < {*split(MANY, MANY, 0.5)[1]}  # nor does a larger fraction bring one back
    keys = [key[:-1] for key in MANY]  # ten rows a key
    parts = [{key[:-1] for key in part} for part in split(MANY, keys, 0.3)]
    assert not parts[0] & parts[1] and all(parts)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_of_few_rows_both_sides_have_some_whatever_the_hashes(count):
    for start in range(0, 400, count):
        keys = MANY[start : start + count]
        for fraction in (1e-9, 0.1, 0.5, 0.999999):
            train, held_out = split(keys, keys, fraction)
            assert len(train) + len(held_out) == len(keys) and train and bool(held_out) == (len(keys) > 1)
        assert split(keys, keys, 0.0) == (keys, [])
    # Rows of one key are trained on; most of the rows are not held out for want of others.
    for keys in (["a"], ["a"] * 20, ["a"] * 99 + ["rare"], ["rare"] * 99 + ["a"]):
        train, held_out = split(keys, keys, 1e-9)
        assert len(held_out) <= 1 and len(train) + len(held_out) == len(keys)


def test_a_fraction_outside_0_to_1_is_refused():
    for fraction in (1, 1.0, 1.5, -0.1, float("nan"), True):
        refusal(lambda fraction=fraction: split(MANY, MANY, fraction), "held_out", "0 to below 1")


def test_every_pass_takes_each_row_once_in_its_own_order():
    passes = [[index_in_order(20 * n + i, 20, seed=3) for i in range(20)] for n in range(4)]
    assert all(sorted(one) == list(range(20)) for one in passes) and len({tuple(one) for one in passes}) == 4
    assert [index_in_order(n, 20, seed=4) for n in range(20)] != passes[0]
    # Whatever was asked for before.
    assert [index_in_order(n, 20, seed=3) for n in (0, 70, 5, 0)] == [passes[0][0], passes[3][10], passes[0][5], passes[0][0]]

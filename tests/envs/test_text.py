"""Text tasks from prompts as users have them, and what is wrong with them."""

import itertools
from pathlib import Path

import numpy
import pytest

from surefoot.envs.text import TextTask
from tests.inputs import Rows, refusal

MANY = [f"prompt number {number}" for number in range(400)]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
KINDS = {
    "list of strings": ["one", "two"],
    "numpy array": numpy.array(["one", "two"]),
    "list of dicts": [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}],
    "data set": Rows([{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}]),
    "chats": [CHAT, [{"role": "user", "content": "Hello"}]],
    "dicts of chats": [{"prompt": CHAT, "n": 1}, {"prompt": CHAT, "n": 2}],
}


def reward(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_in_many_kinds(kind):
    task = TextTask(KINDS[kind], reward, held_out=0)
    assert len(task.train) == 2 and task.held_out == []
    assert task.train[0].prompt == (CHAT if "chats" in kind else "one")
    assert task.train[1].columns == ({"n": 2} if "dicts" in kind or kind == "data set" else {})


def test_the_prompt_column_can_have_another_name():
    example = TextTask([{"question": "why", "prompt": "x", "n": 1}], reward, prompt_column="question", held_out=0).train[0]
    assert example.prompt == "why" and example.columns == {"prompt": "x", "n": 1}


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        ([], ("prompts", "no prompts there")),
        ("empty.jsonl", ("empty.jsonl", "no prompts there")),
        (Rows([{"text": "one"}]), ("prompts, row 1", "no column 'prompt'", "text")),
        ([{"prompt": "one"}, {}], ("prompts, row 2", "no column 'prompt'", "none")),
        ([{"prompt": None}], ("prompts, row 1", "got NoneType")),
        ([{"prompt": "one", "prompts": 1}], ("prompts, row 1", "'prompts'")),
        ([{"prompt": "one", "completions": 3}], ("prompts, row 1", "'completions'")),
    ],
)
def test_prompts_of_no_usable_kind_are_refused(tmp_path, monkeypatch, prompts, names):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    refusal(lambda: TextTask(prompts, reward), *names)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        *[({"held_out": wrong}, ("held_out",)) for wrong in (1.5, True, None, 5 + 1j, {"a": 1}, ["one", 2])],
        # A negative number would be taken for a slice from the end.
        *[({"prompt_tokens": wrong}, ("prompt_tokens",)) for wrong in (0, -3, 2.5, "6")],
        ({"chat": True, "prompt_tokens": 6}, ("prompt_tokens", "chat template")),  # what is left of it would be no chat
        ({"held_out": [[{"role": "user", "content": "a"}]], "prompt_tokens": 6}, ("prompt_tokens", "chat template")),
        *[({"reward": wrong}, ("reward",)) for wrong in (None, "reward.py:reward", 0.5, [1])],
        ({"metric": "accuracy"}, ("metric",)),
    ],
    ids=str,
)
def test_settings_that_make_no_task_are_refused(settings, names):
    refusal(lambda: TextTask(MANY, **{"reward": reward, **settings}), *names)


def test_who_is_held_out_depends_on_the_text_alone():
    task = TextTask(MANY * 2, reward, held_out=0.25)
    train, held_out = ({e.text for e in part} for part in (task.train, task.held_out))
    assert 70 < len(held_out) < 130 and not train & held_out and train | held_out == {*MANY}
    assert {e.text for e in TextTask(MANY[::-1][:200], reward, held_out=0.25).held_out} == held_out & {*MANY[200:]}


def test_one_generator_for_both_is_named():
    prompts = iter(["a", "b"])
    refusal(lambda: TextTask(prompts, reward, held_out=prompts), "held_out", "read to its end")
    prompts = iter(["a", "b", "c"])
    task = TextTask(itertools.islice(prompts, 2), reward, held_out=prompts)
    assert [[one.prompt for one in part] for part in (task.train, task.held_out)] == [["a", "b"], ["c"]]

"""Reward functions: called as TRL calls them, found by name, and never trusted."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surefoot.errors import InputError
from surefoot.rewards.functions import compute_rewards, load_function
from tests.fakes import trajectory

ANSWERS = [trajectory("good"), trajectory("bad"), trajectory("ugly")]


def returning(scores: Any) -> Callable[..., Any]:
    """A reward function that returns `scores`, whatever it is asked."""
    return lambda **_: scores


def test_function_gets_prompts_and_completions_in_order() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        assert prompts == ["How are you?"] * 3
        return [float(len(completion)) for completion in completions]

    assert compute_rewards(reward, ANSWERS) == [4.0, 3.0, 4.0]


def test_columns_come_as_keywords_with_one_entry_a_sample() -> None:
    seen: dict[str, Any] = {}

    def reward(*, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        seen.update(columns)
        return [0.0] * len(prompts)

    rows = [trajectory(columns={"answer": 4, "level": "easy"}), trajectory(columns={"answer": 5})]
    compute_rewards(reward, rows)
    assert seen == {"answer": [4, 5], "level": ["easy", None]}


def test_chat_prompts_get_completions_as_message_lists() -> None:
    chat = [{"role": "user", "content": "How are you?"}]
    seen: dict[str, Any] = {}

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [0.0, 0.0]

    compute_rewards(reward, [trajectory("fine", prompt=chat), trajectory("well", prompt="How are you?")])
    assert seen["prompts"] == [chat, "How are you?"]
    assert seen["completions"] == [[{"role": "assistant", "content": "fine"}], "well"]


@pytest.mark.parametrize(
    "scores",
    [
        [1.5, -2, True],
        (1.5, -2.0, 1.0),
        np.array([1.5, -2.0, 1.0]),
        np.array([1.5, -2.0, 1.0], dtype=np.float32),
        [np.float32(1.5), np.int64(-2), np.bool_(True)],
        [np.array(1.5), np.array([-2.0]), 1],
        torch.tensor([1.5, -2.0, 1.0]),
        [torch.tensor(1.5), torch.tensor([-2.0]), torch.tensor(1)],
        torch.tensor([1.5, -2.0, 1.0], dtype=torch.bfloat16),
    ],
)
def test_numbers_of_every_library_become_floats(scores: Any) -> None:
    checked = compute_rewards(returning(scores), ANSWERS)
    assert checked == [1.5, -2.0, 1.0]
    assert all(type(value) is float for value in checked)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        float("nan"),
        float("inf"),
        -float("inf"),
        "0.5",
        "nan",
        b"1",
        [0.5],
        {"score": 1.0},
        1 + 2j,
        Decimal("0.5"),
        10**400,
        np.float32("nan"),
        np.str_("0.5"),
        np.array([1.0, 2.0]),
        torch.tensor(float("inf")),
        torch.tensor([1.0, 2.0]),
        torch.tensor([]),
    ],
    ids=repr,
)
def test_score_that_is_no_finite_number_names_the_sample(bad: Any) -> None:
    with pytest.raises(
        InputError, match=r"reward function returned .* for sample 1 \(prompt 'How are you\?', completion 'bad'\)"
    ):
        compute_rewards(returning([0.5, bad, 0.5]), ANSWERS)


def test_bad_score_is_quoted_short() -> None:
    with pytest.raises(InputError) as caught:
        compute_rewards(returning([0.5, "x" * 10_000]), [trajectory(), trajectory("y" * 10_000, prompt="z" * 10_000)])
    assert len(str(caught.value)) < 400 and "xxx" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("scores", [[], [0.1], [0.1, 0.2], [0.1] * 4, np.zeros(2), torch.zeros(4)])
def test_wrong_count_is_an_error_and_not_filled_up(scores: Any) -> None:
    with pytest.raises(InputError, match=rf"returned {len(scores)} rewards for 3 completions"):
        compute_rewards(returning(scores), ANSWERS)


@pytest.mark.parametrize(
    "scores",
    [
        None,
        0.5,
        "abc",
        b"abc",
        (x for x in (0.1, 0.2, 0.3)),
        np.array(0.5),
        torch.tensor(0.5),
        {0: 1, 1: 2, 2: 3},
        {1.0, 2.0, 3.0},
    ],
    ids=repr,
)
def test_result_that_is_no_list_is_an_error(scores: Any) -> None:
    """Of a dict the keys would be taken for scores, of a set the order is anyone's guess."""
    with pytest.raises(InputError, match="a list of 3 floats is needed"):
        compute_rewards(returning(scores), ANSWERS)


def test_function_that_raises_is_an_error_and_not_a_zero() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 / (len(completion) - 3) for completion in completions]

    with pytest.raises(
        InputError, match=r"the reward function raised ZeroDivisionError.*test_functions\.py, line \d+"
    ) as caught:
        compute_rewards(reward, ANSWERS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_function_that_cannot_take_the_columns_is_an_error() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(InputError, match=r"TypeError.*'answer'"):
        compute_rewards(reward, [trajectory(columns={"answer": 4})])


def test_interrupt_inside_a_reward_function_is_not_swallowed() -> None:
    def reward(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_rewards(reward, ANSWERS)


def test_message_names_the_function_meant() -> None:
    with pytest.raises(InputError, match="the metric function returned 1 rewards"):
        compute_rewards(returning([0.0]), ANSWERS, name="metric")


def test_function_is_found_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text("def reward(prompts, completions):\n    return [len(c) for c in completions]\n")
    function = load_function(f"{tmp_path}/my_reward.py:reward", key="task.reward")
    assert compute_rewards(function, ANSWERS) == [4.0, 3.0, 4.0]


def test_two_files_of_one_name_keep_their_own_functions(tmp_path: Path) -> None:
    functions = []
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "reward.py").write_text(
            f"SCORE = {value}\ndef reward(prompts, completions):\n    return [SCORE] * len(prompts)\n"
        )
        functions.append(load_function(f"{folder}/reward.py:reward", key="task.reward"))
    assert [compute_rewards(function, ANSWERS[:1]) for function in functions] == [[1.0], [2.0]]


def test_function_is_found_in_a_module() -> None:
    assert load_function("builtins:len", key="task.reward") is builtins.len


@pytest.mark.parametrize("reference", ["reward.py", "reward", ":reward", "reward.py:", "reward.py:a b", "reward.py:a.b", ""])
def test_reference_of_another_form_is_refused(reference: str) -> None:
    with pytest.raises(InputError, match=r"^task\.reward: expected 'file\.py:function' or 'package\.module:function'"):
        load_function(reference, key="task.reward")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no file"),
        ("def reward(:", "cannot be imported: SyntaxError"),
        ("raise ValueError('broken inside')", "cannot be imported: ValueError: broken inside"),
        ("import no_such_package_anywhere", "cannot be imported: ModuleNotFoundError"),
        ("other = 1", "has no function 'reward'"),
        ("reward = 0.5", "has no function 'reward'"),
    ],
)
def test_file_that_cannot_serve_is_named_with_the_key(tmp_path: Path, source: str | None, message: str) -> None:
    file = tmp_path / "reward.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(InputError, match=rf"^task\.metric: .*reward\.py.*{message}|^task\.metric: {message}.*reward\.py"):
        load_function(f"{file}:reward", key="task.metric")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package_anywhere.rewards:reward", "cannot be imported: ModuleNotFoundError"),
        ("math:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
        ("..rewards:reward", "cannot be imported"),
        ("broken_reward_module:reward", "cannot be imported: ValueError: broken inside"),
    ],
)
def test_module_that_cannot_serve_is_named_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, message: str
) -> None:
    (tmp_path / "broken_reward_module.py").write_text("raise ValueError('broken inside')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"^task\.reward: .*{message}"):
        load_function(reference, key="task.reward")

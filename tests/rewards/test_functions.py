"""Reward functions: called as TRL calls them, found by name, and never trusted."""

import asyncio
import builtins
import gc
import math
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from surefoot.config.messages import short
from surefoot.errors import InputError
from surefoot.rewards.functions import RewardLog, compute_rewards, compute_several, load_function
from tests.fakes import trajectory
from tests.golden import refused

ANSWERS = [trajectory("good"), trajectory("bad"), trajectory("ugly")]


def returning(rewards: Any) -> Callable[..., Any]:
    """A reward function that returns `rewards`, whatever it is asked."""
    return lambda **_: rewards


def test_a_function_gets_prompts_completions_and_columns_in_order_messages_where_the_prompt_was_some() -> None:
    seen: dict[str, Any] = {}

    def reward(*, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [4.0, 3.0]

    chat = [{"role": "user", "content": "How are you?"}]
    rows = [trajectory("fine", prompt=chat, columns={"answer": 4, "level": "easy"}), trajectory("well", columns={"answer": 5})]
    assert compute_rewards(reward, rows) == [4.0, 3.0]
    assert seen["prompts"] == [chat, "How are you?"]
    assert seen["completions"] == [[{"role": "assistant", "content": "fine"}], "well"]
    assert (seen["answer"], seen["level"]) == ([4, 5], ["easy", None])


NUMBERS: list[Any] = [[1.5, -2, True], (1.5, -2.0, 1.0), np.array([1.5, -2.0, 1.0], dtype=np.float32)]
NUMBERS += [[np.float32(1.5), np.int64(-2), np.bool_(True)], [np.array(1.5), np.array([-2.0]), 1]]
NUMBERS += [[torch.tensor(1.5), torch.tensor([-2.0]), torch.tensor(1)], torch.tensor([1.5, -2.0, 1.0], dtype=torch.bfloat16)]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers_of_every_library_become_floats(numbers: Any) -> None:
    checked = compute_rewards(returning(numbers), ANSWERS)
    assert checked == [1.5, -2.0, 1.0] and {type(value) for value in checked} == {float}


NO_NUMBERS: list[Any] = [float("nan"), -float("inf"), "0.5", b"1", [0.5], {"score": 1.0}, 1 + 2j, 10**400]
NO_NUMBERS += [Decimal("0.5"), np.float32("nan"), np.str_("0.5"), np.array([1.0, 2.0])]
NO_NUMBERS += [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor(float("inf"))]
# Within float64, but squares of them leave float32; and what cannot even be shown.
NO_NUMBERS += [1e39, -1e20, np.float64(1e300), type("Mute", (), {"__repr__": None})()]


@pytest.mark.parametrize("bad", NO_NUMBERS, ids=short)
def test_a_reward_that_is_not_a_finite_number_names_the_sample(bad: Any) -> None:
    with refused("reward function ", " for sample 1 (prompt 'How are you?', completion 'bad')"):
        compute_rewards(returning([0.5, bad, 0.5]), ANSWERS)


def test_a_bad_reward_is_quoted_short() -> None:
    with pytest.raises(InputError) as caught:
        compute_rewards(returning([0.5, "x" * 10_000]), [trajectory(), trajectory("y" * 10_000, prompt="z" * 10_000)])
    assert "xxx" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("rewards", [[], [0.1], [0.1, 0.2], [0.1] * 4, np.zeros(2), torch.zeros(4)])
def test_wrong_count_is_an_error_and_not_filled_up(rewards: Any) -> None:
    with refused(f"the metric function returned {len(rewards)} rewards for 3 completions"):
        compute_rewards(returning(rewards), ANSWERS, name="metric")


# Of a dict the keys would be taken for rewards, of a set the order is anyone's guess.
NO_LISTS: list[Any] = [None, 0.5, "abc", b"abc", (x for x in (0.1, 0.2, 0.3)), {0: 1, 1: 2, 2: 3}, {1.0, 2.0, 3.0}]


@pytest.mark.parametrize("result", [*NO_LISTS, np.array(0.5), torch.tensor(0.5)])
def test_a_result_that_is_not_a_list_is_an_error(result: Any) -> None:
    with refused("a list of 3 floats is needed"):
        compute_rewards(returning(result), ANSWERS)


def test_function_that_raises_is_an_error_and_not_a_zero_and_an_interrupt_is_one() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 / (len(completion) - 3) for completion in completions]

    with refused("the reward function raised ZeroDivisionError", "test_functions.py, line "):
        compute_rewards(reward, ANSWERS)
    with refused("TypeError", "'answer'"):  # it cannot take the columns
        compute_rewards(reward, [trajectory(columns={"answer": 4})])
    with pytest.raises(KeyboardInterrupt):
        compute_rewards(Mock(side_effect=KeyboardInterrupt), ANSWERS)


def test_what_is_handed_out_is_a_copy_for_each_sample_and_call() -> None:
    chat = [{"role": "user", "content": "How are you?"}]
    rows = [trajectory("fine", prompt=chat, columns={"tests": [1, 2, 3], "lock": threading.Lock()})] * 2

    def reward(prompts: list[Any], completions: list[Any], tests: list[Any], **columns: Any) -> list[float]:
        for prompt, answer, test in zip(prompts, completions, tests, strict=True):
            prompt.extend(answer)
            prompt[0]["content"] = test.pop()
        lengths = [float(len(prompt) + len(test)) for prompt, test in zip(prompts, tests, strict=True)]
        prompts.clear()
        return lengths

    assert [compute_rewards(reward, rows) for _ in range(2)] == [[4.0, 4.0]] * 2
    assert (chat, rows[0].columns["tests"]) == ([{"role": "user", "content": "How are you?"}], [1, 2, 3])


def test_two_files_of_one_name_keep_their_own_functions(tmp_path: Path) -> None:
    functions = []
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        file = tmp_path / str(value) / "twice_named.py"
        file.write_text(f"SCORE = {value}\ndef reward(prompts, completions): return [SCORE] * len(prompts)\n")
        functions.append(load_function(f"{file}:reward", key="task.reward"))
    assert [compute_rewards(function, ANSWERS[:1]) for function in functions] == [[1.0], [2.0]]
    assert load_function("builtins:len", key="task.reward") is builtins.len
    # Workers that are spawned import the first by this name, from its folder.
    assert functions[0].__module__ == "twice_named" != functions[1].__module__


UNFORMED = ["reward.py", "reward", ":reward", "reward.py:", "reward.py:a b", "reward.py:a.b", ""]
ABSENT = ["math:no_such_function", "math:pi", "..rewards:reward"]


@pytest.mark.parametrize("reference", [*UNFORMED, *ABSENT])
def test_a_reference_of_another_form_or_to_no_function_is_refused(reference: str) -> None:
    form = "expected 'file.py:function' or 'package.module:function'"
    with refused("task.reward: ", form if reference in UNFORMED else ""):
        load_function(reference, key="task.reward")


NOT_SERVING = {
    "def reward(:": "SyntaxError",
    "raise ValueError('broken inside')": "ValueError: broken inside",
    "import no_such_package_anywhere": "ModuleNotFoundError",
    "other = 1": "has no function 'reward'",
    "reward = 0.5": "has no function 'reward'",
}


@pytest.mark.parametrize("source", [*NOT_SERVING, None])
def test_a_file_or_module_that_cannot_serve_is_named_with_the_key(tmp_path: Path, monkeypatch: Any, source: str | None) -> None:
    monkeypatch.delitem(sys.modules, "bad_reward", raising=False)  # the case before
    if source is not None:
        (tmp_path / "bad_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for place, missing in ((f"{tmp_path}/bad_reward.py", "no file"), ("bad_reward", "ModuleNotFoundError")):
        with refused("task.metric: ", "bad_reward", missing if source is None else NOT_SERVING[source]):
            load_function(f"{place}:reward", key="task.metric")


def test_functions_that_wait_wait_at_the_same_time_also_under_a_running_loop() -> None:
    met: list[str] = []

    def waiting(name: str) -> Any:
        async def reward(completions: list[str], **columns: Any) -> list[float]:
            met.append(name)
            while len(met) < 2:  # for ever, unless the other one runs too
                await asyncio.sleep(0)
            return [float(len(text)) for text in completions]

        return reward

    async def in_a_notebook() -> dict[str, list[float]]:
        return scored()

    def scored() -> dict[str, list[float]]:
        met.clear()
        return compute_several({"a": waiting("a"), "b": waiting("b")}, ANSWERS, RewardLog())

    expected = [float(len(t.completion_text)) for t in ANSWERS]
    assert scored() == asyncio.run(in_a_notebook()) == {"a": expected, "b": expected}

    async def broken(**given: Any) -> list[float]:
        raise KeyError("later")

    with refused("the reward b function raised KeyError", "test_functions.py, line "):
        compute_several({"reward a": returning([0.5] * 3), "reward b": broken}, ANSWERS, RewardLog())
    with refused("the reward b function raised TypeError"):  # and what waits then is closed, without a warning
        compute_several({"reward a": waiting("a"), "reward b": lambda: 1}, ANSWERS, RewardLog())
    gc.collect()


def test_functions_that_name_them_get_tokens_state_and_logs_as_trls_do() -> None:
    log, answers = RewardLog(global_step=7), [trajectory(tokens=(3, 2)), trajectory(tokens=(4,))]

    def reward(completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        assert [*columns] == ["prompts"] and completion_ids == [[3, 2], [4]] and trainer_state.global_step == 7
        log_metric("parsed", 1), log_metric("parsed", np.float32(0.5)), log_extra("answer", ["a", {1}])
        return [0.0, 1.0]

    compute_rewards(reward, answers, log=log)
    assert log.means("reward/log/<name>") == {"reward/log/parsed": 0.75}
    assert [t.record()["extra"] for t in answers] == [{"answer": "a"}, {"answer": "{1}"}]
    for broken in (
        lambda log_metric, **_: log_metric("x", math.nan),
        lambda log_extra, **_: log_extra("x", [1]),
        lambda log_metric, **_: log_metric("a/b", 1),
    ):
        with refused("log_"):
            compute_rewards(broken, answers)

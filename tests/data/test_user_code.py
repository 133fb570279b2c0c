"""The user's code behind its guard: what it leaves changed, what it raises, and what is known while it runs."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from surefoot.data.user_code import Guard, _state, set_aside
from tests.golden import refused

KEPT: list[Any] = []  # contexts that are never left


def enter(context: Any) -> None:
    KEPT.append(context)
    context.__enter__()


LEFT: dict[str, Callable[[], Any]] = {
    "folder": lambda: os.chdir("/"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "inference mode": lambda: enter(torch.inference_mode()),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
    "an autocast that is off": lambda: enter(torch.autocast("cpu", enabled=False)),  # it would keep old weights cast
    "SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "SIGTERM": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_it_leaves_changed_is_put_back_and_is_set_aside_for_a_signal(left: str) -> None:
    before = _state()
    with Guard("the reward function"):
        LEFT[left]()
        during = _state()
        assert during != before
        with set_aside() as what:
            assert (what, _state()) == ("the reward function", before)
        assert _state() == during
    assert _state() == before
    with set_aside() as what:
        assert what is None


class Silent(Exception):
    def __str__(self) -> str:
        raise OSError("no words")


class Apart(BaseException):
    pass


RAISED = [SystemExit(), SystemExit(0), GeneratorExit(), asyncio.CancelledError(), Apart("b"), Silent(), StopIteration()]


@pytest.mark.parametrize("error", [*RAISED, KeyboardInterrupt(), RuntimeError("\x1b[2J\x1b]0;title\x07 two\nlines")], ids=repr)
def test_whatever_it_raises_is_one_line_that_a_terminal_can_show(error: BaseException) -> None:
    def listening(number: int, frame: Any) -> None:
        """As in a run, where Ctrl-C raises nothing."""

    before = signal.signal(signal.SIGINT, listening)
    try:
        with refused(f"the reward function raised {type(error).__name__}"), Guard("the reward function"):
            raise error
    finally:
        signal.signal(signal.SIGINT, before)


def test_escapes_are_shown_and_control_c_outside_a_run_is_a_persons() -> None:
    with refused(r"\x1b[2J two lines"), Guard("the reward function"):
        raise RuntimeError("\x1b[2J two\nlines")
    with pytest.raises(KeyboardInterrupt), Guard("the reward function"):
        raise KeyboardInterrupt

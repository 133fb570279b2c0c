"""SIGTERM and Ctrl-C, once and twice, at every place of a run of text: what is saved, said and gone on with."""

import errno
import io
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from surefoot.errors import Interrupted
from surefoot.train.signals import StopRequest
from tests.train.small_run import assert_equal, noisy_letters, python_ppo, python_task, rows, same_weights, write_project
from tests.train.warm import Strike

TERM, INT, KILL, HUP = (int(getattr(signal, f"SIG{name}")) for name in ("TERM", "INT", "KILL", "HUP"))
DECODE = "surefoot.generation.engine:TokenEngine._decode"
REWARD = "random:gauss"
STEP = "surefoot.train.update:take_step"
STEPS_AN_UPDATE = 4
WRITE = "surefoot.train.checkpoint:save_file"
EVALUATE = "surefoot.train.loop:evaluate"
COLLECT = "surefoot.train.loop:collect"

# Where the signal comes -> after which update the run stops, and the work it must not begin any more.
PLACES: dict[str, tuple[Strike, int, Strike]] = {
    "before the first evaluation": (Strike(EVALUATE, 1), 0, Strike(COLLECT, 1)),
    "first evaluation": (Strike(DECODE, 2), 0, Strike(DECODE, 3)),
    "first rollout": (Strike(DECODE, 2, since=(COLLECT, 1)), 0, Strike(DECODE, 3, since=(COLLECT, 1))),
    "rollout": (Strike(DECODE, 2, since=(COLLECT, 4)), 3, Strike(DECODE, 3, since=(COLLECT, 4))),
    "reward": (Strike(REWARD, 37), 3, Strike(STEP, 3 * STEPS_AN_UPDATE + 1)),
    "update": (Strike(STEP, 2 * STEPS_AN_UPDATE + 2), 3, Strike(COLLECT, 4)),
    "evaluation": (Strike(EVALUATE, 4), 3, Strike(COLLECT, 4)),
    "save": (Strike(WRITE, 3), 2, Strike(COLLECT, 3)),
}
WAITS = "surefoot: asked to stop; waiting for the reward function to return, the next signal ends it at once\n"
OTHERS = ("checkpoints",)  # which an interrupted run keeps


@pytest.mark.parametrize("case", [*((place, TERM) for place in PLACES), ("rollout", INT), ("reward", HUP)], ids=str)
def test_a_signal_saves_stops_and_says_how_to_go_on(tmp_path, base, warm, uninterrupted, case: tuple[str, int]):
    place, number = case
    strike, updates, forbidden = PLACES[place]
    strikes = [replace(strike, signals=[number]), replace(forbidden, signals=[KILL])]
    run = write_project(tmp_path, base)
    ended = warm.run(tmp_path, "ppo", "ppo.yaml", strikes=strikes)
    assert ended.code == 128 + number
    how = f"surefoot: stopped after update {updates}, saved; continue with: surefoot resume runs/run\n"
    assert ended.stderr == (WAITS if place == "reward" else "") + how
    assert (run / "checkpoints" / "latest").read_text() == f"{updates:08d}"
    assert not (run / "model").exists()
    ended = warm.run(tmp_path, *how.rpartition("surefoot ")[2].split())
    assert ended.code == 0, ended.stderr
    assert_equal(run, uninterrupted, but=OTHERS)


def test_a_second_signal_exits_at_once_but_one_delivered_twice_is_one(tmp_path, base, warm, uninterrupted):
    run = write_project(tmp_path, base)
    # Within the reward function, which nobody can interrupt politely.
    strikes = [Strike(REWARD, 38, [INT, TERM], pause=0.4)]
    ended = warm.run(tmp_path, "ppo", "ppo.yaml", "--run.checkpoint-every", "50", strikes=strikes)
    assert (ended.code, ended.stderr) == (128 + TERM, WAITS)
    assert (run / "checkpoints" / "latest").read_text() == "00000003"  # written for the first
    assert warm.run(tmp_path, "resume", "runs/run").code == 0
    assert_equal(run, uninterrupted, but=OTHERS)
    # `timeout` and batch systems signal the process and then its group.
    write_project(tmp_path / "twice", base)
    ended = warm.run(tmp_path / "twice", "ppo", "ppo.yaml", strikes=[Strike(REWARD, 38, [TERM, TERM], pause=0.01)])
    assert ended.code == 128 + TERM and "saved; continue with" in ended.stderr


@pytest.mark.parametrize("number", [None, HUP])
def test_a_run_outlives_its_terminal(tmp_path, base, warm, uninterrupted, number: int | None):
    run = write_project(tmp_path, base)
    signals = [] if number is None else [number]  # None: nohup's, or none that reaches it
    ended = warm.run(tmp_path, "ppo", "ppo.yaml", strikes=[Strike(COLLECT, 3, signals, hang_up=True)])
    assert ended.code == (128 + number if number else 0)
    if number:
        assert (run / "checkpoints" / "latest").read_text() == "00000002"
        assert warm.run(tmp_path, "resume", "runs/run").code == 0
    assert_equal(run, uninterrupted, but=OTHERS)


def test_an_ignored_hang_up_stays_ignored_and_a_second_one_is_no_second_request():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), HUP)
            assert stop.signal_number is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest().listening() as stop:
            for pause in (0.0, 0.4):  # the shell hangs up, and then the kernel
                time.sleep(pause)
                os.kill(os.getpid(), HUP)
            assert stop.signal_number == HUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


class Broken(io.StringIO):
    """A stream whose every write fails."""

    error: Exception

    def write(self, text: str) -> int:
        raise self.error


BROKEN = [OSError(errno.EIO, ""), BrokenPipeError(), OSError(errno.ENOSPC, ""), ValueError("I/O operation on closed file")]


@pytest.mark.parametrize("error", BROKEN, ids=repr)
def test_nothing_that_is_shown_ends_a_run(tmp_path, base, monkeypatch, error: Exception):
    def chatty(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        print("called")
        print("called", file=sys.stderr, flush=True)
        return noisy_letters(prompts, completions)

    model = python_ppo(base, tmp_path, chatty)
    model._session.verbose = 1
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken())
    monkeypatch.setattr(Broken, "error", error, raising=False)
    broken = sys.stdout, sys.stderr
    assert model.learn().is_finished and (sys.stdout, sys.stderr) == broken


def test_interrupting_again_and_again_changes_nothing(tmp_path, base, warm, uninterrupted):
    run = write_project(tmp_path, base)
    codes = [warm.run(tmp_path, "ppo", "ppo.yaml", strikes=[Strike(DECODE, 2, [TERM])]).code]
    while codes[-1]:
        assert len(codes) < 40
        codes.append(warm.run(tmp_path, "resume", "runs/run", strikes=[Strike(DECODE, 13, [TERM])]).code)
    assert codes.count(128 + TERM) == len(codes) - 1 > 5
    assert_equal(run, uninterrupted, but=OTHERS)


def test_control_c_while_loading_is_one_line(tmp_path, base, warm):
    run = write_project(tmp_path, base)
    ended = warm.run(tmp_path, "ppo", "ppo.yaml", strikes=[Strike("surefoot.build.language:load_policy", 1, [INT])])
    assert (ended.code, ended.stderr) == (130, "surefoot: stopped\n")
    assert not run.exists()


def interrupting(at_call) -> Any:
    """The reward of the Python runs, and Ctrl-C while it is called for the `at_call`th time."""
    calls = 0

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGINT)
        return noisy_letters(prompts, completions)

    return reward


def test_after_control_c_learn_or_load_goes_on_as_if_nothing_had_been(tmp_path, base):
    whole = python_ppo(base, tmp_path / "whole", noisy_letters).learn()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for again, at_call in (("learn", 7), ("load", 7)):  # the probe, then evaluations and rollouts in turn
        model = python_ppo(base, tmp_path / again, interrupting(at_call))
        said = r"stopped after update 2, saved; continue .*: PPO\.load\('.*run', task\)"
        with pytest.raises(Interrupted, match=said) as error:
            model.learn()
        assert error.value.exit_code == 130 and isinstance(error.value, KeyboardInterrupt)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        if again == "load":  # beside the old model
            model = type(model).load(model.run_folder, python_task(noisy_letters), verbose=0)
        model.learn()
        for log in ("metrics.jsonl", "samples.jsonl"):
            assert rows(model.run_folder, log) == rows(whole.run_folder, log)
        assert same_weights(whole, model)


def test_outside_the_main_thread_a_run_goes_without_handlers(tmp_path, base):
    model = python_ppo(base, tmp_path)
    thread = threading.Thread(target=model.learn, args=(6,))
    thread.start()
    thread.join()
    assert model.run_folder is not None and rows(model.run_folder)[-1]["update"] == 1

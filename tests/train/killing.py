"""Kills a process that saves checkpoints, at every file-system call and at random moments, and looks at what is left.

Run as `python -m tests.train.killing every-call|random FOLDER`; prints what was seen as JSON, fails by a traceback.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surefoot.train.checkpoint import load_checkpoint, newest_checkpoint, point, pointed_checkpoint, save_checkpoint

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def save(folder: Path, number: int, *, size: int = 100, note: str = "", keep: int = 2) -> Path:
    tensors = {name: {"weight": torch.full((size,), float(number))} for name in ("policy", "optimizer")}
    return save_checkpoint(folder, number, tensors=tensors, state={"number": number, "note": note}, keep=keep)


def number_in(path: Path | None) -> int:
    """The number of a checkpoint whose parts agree; 0 if there is none."""
    if path is None:
        return 0
    tensors, state = load_checkpoint(path)
    assert set(tensors) == {"policy", "optimizer"}
    for contents in tensors.values():
        assert bool((contents["weight"] == state["number"]).all())
    return int(state["number"])


def nothing_yet(folder: Path) -> None:
    """The run's first checkpoint is saved: before it there is none, after it there is one."""


def two_and_the_best(folder: Path) -> None:
    for number in (3, 4):
        save(folder, number)
    point(folder, "best", "00000003")


def an_old_one_to_remove(folder: Path) -> None:
    two_and_the_best(folder)
    save(folder, 5)


def the_same_while_the_old_one_still_steps_aside(folder: Path) -> None:
    shutil.copytree(save(folder, 5), folder / "00000005.old")


def a_damaged_one_of_that_number(folder: Path) -> None:
    an_old_one_to_remove(folder)
    (folder / "00000005" / "policy.safetensors").write_bytes(b"")


# What is there before checkpoint 5 is saved -> the least number that must be loadable however the saving ends.
BEFORE: dict[Callable[[Path], None], int] = {
    **{nothing_yet: 0, two_and_the_best: 4, an_old_one_to_remove: 5},
    **{the_same_while_the_old_one_still_steps_aside: 5, a_damaged_one_of_that_number: 4},
}


def kill_at_every_call(folder: Path) -> dict[str, int]:
    """Number of kills per situation: the nth file-system call of a save, for every n until a save gets through."""
    kills = {}
    for prepare, least in BEFORE.items():
        ready = folder / prepare.__name__
        ready.mkdir(parents=True)
        prepare(ready)
        for nth in itertools.count(1):
            struck = shutil.copytree(ready, folder / "struck")
            is_killed = _killed(lambda struck=struck: save(struck, 5, note="new"), nth)
            if is_killed:
                _look(struck, least)
            shutil.rmtree(struck)
            if not is_killed:
                kills[prepare.__name__] = nth - 1
                break
    return kills


def _look(folder: Path, least: int) -> None:
    has_best = (folder / "best").exists()
    assert number_in(newest_checkpoint(folder)) >= least
    assert not has_best or number_in(pointed_checkpoint(folder, "best")) == 3
    path = save(folder, 5, note="again")  # what a resumed run will do
    assert newest_checkpoint(folder) == path and load_checkpoint(path)[1]["note"] == "again"
    assert not [p for p in folder.iterdir() if p.suffix in (".tmp", ".old")]
    assert not has_best or number_in(pointed_checkpoint(folder, "best")) == 3


def _killed(work: Callable[[], Any], nth: int) -> bool:
    """Do `work` in a child that kills itself before its nth file-system call; whether it got that far."""
    child = os.fork()
    if child == 0:
        counter = itertools.count(1)

        def strike(event: str, arguments: tuple[object, ...]) -> None:
            if event in CALLS and next(counter) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def kill_at_random(folder: Path, kills: int) -> dict[str, int]:
    """Kill a loop of saves again and again; how many saves were finished and how many kills hit one half done."""
    chance = random.Random(1)
    seen = {"kills": kills, "saves": 0, "half done": 0}
    standing = 0
    for _ in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for number in itertools.count(standing + 1):
                save(folder, number, size=400_000)
                os.write(write, number.to_bytes(4, "little"))
        os.close(write)
        acknowledged = os.read(read, 4)  # past the start of the process, into the loop
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 1 << 16):
            acknowledged = more[-4:]
        os.close(read)
        last, before = int.from_bytes(acknowledged, "little"), standing
        standing = number_in(newest_checkpoint(folder))
        assert last <= standing <= last + 1, f"checkpoint {last} was saved, {standing} is the newest"
        seen["saves"] += standing - before
        seen["half done"] += any(path.suffix == ".tmp" for path in folder.iterdir())
    return seen


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a killed process loses nothing it wrote; only a power cut does
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    print(json.dumps(kill_at_every_call(place) if sys.argv[1] == "every-call" else kill_at_random(place, 40)))

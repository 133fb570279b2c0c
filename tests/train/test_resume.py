"""A run of text killed anywhere, with damage, other weights, other critics: resumed it is the run that was not killed."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.tiny import LSTM
from tests.train.small_run import EPISODES, UPDATES, assert_equal, outcome, write_base, write_project
from tests.train.warm import Strike

KILL = [int(signal.SIGKILL)]
REWARD = "random:gauss"  # drawn by the reward function once an answer
STEP = "surefoot.train.update:take_step"
WRITE = "surefoot.train.checkpoint:save_file"
PUT = "surefoot.train.checkpoint:_put_in_place"
POINT = "surefoot.train.checkpoint:point"
EVALUATE = "surefoot.train.loop:evaluate"


def test_the_run_under_test_exercises_what_it_should(uninterrupted):
    training = [row for row in uninterrupted["metrics"] if "reward/mean" in row]
    assert len(training) == UPDATES and len(uninterrupted["metrics"]) == 2 * UPDATES + 1
    assert len({row["kl/coef"] for row in training}) == UPDATES
    rates = [row["ppo/learning_rate"] for row in training]
    assert rates[0] < max(rates) > rates[-1]
    assert uninterrupted["state"]["rollout"]["reward_stats"]["count"] == UPDATES * EPISODES
    # The best is neither the first nor the last, and was the newest of several bests.
    assert 1 < uninterrupted["state"]["progress"]["best_update"] < UPDATES
    assert uninterrupted["state"]["progress"]["bad_steps"] == 0
    assert len(set(uninterrupted["policy"].values())) == len(uninterrupted["policy"]) > 20
    assert len(uninterrupted["optimizer"]) == 3 * len(uninterrupted["policy"])


def test_a_best_checkpoint_that_was_killed_before_its_pointer_is_still_the_best(tmp_path, base, warm, uninterrupted):
    best = uninterrupted["state"]["progress"]["best_update"]
    # The first evaluation is before any update; a best checkpoint becomes the latest first.
    strike = Strike(POINT, 2, KILL, since=(EVALUATE, best + 1))
    run = write_project(tmp_path, base)
    assert warm.run(tmp_path, "ppo", "ppo.yaml", strikes=[strike]).code == -signal.SIGKILL
    assert (run / "checkpoints" / "latest").read_text() == f"{best:08d}" != (run / "checkpoints" / "best").read_text()
    assert warm.run(tmp_path, "resume", "runs/run").code == 0
    assert_equal(run, uninterrupted)


def test_a_run_killed_at_every_turn_still_gets_there(tmp_path, base, warm, uninterrupted):
    run = write_project(tmp_path, base)
    kills = [Strike(WRITE, 3, KILL), Strike(STEP, 5, KILL), Strike(PUT, 2, KILL), Strike(REWARD, 9, KILL)]
    for verb, strike in zip([("ppo", "ppo.yaml"), *[("resume", "runs/run")] * 3], kills, strict=True):
        assert warm.run(tmp_path, *verb, strikes=[strike]).code == -signal.SIGKILL
    assert warm.run(tmp_path, "resume", "runs/run").code == 0
    assert_equal(run, uninterrupted)


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json", "manifest.json", "pointers"])
def test_a_damaged_newest_checkpoint_costs_updates_not_the_run(tmp_path, base, warm, uninterrupted, name):
    run = write_project(tmp_path, base)
    warm.run(tmp_path, "ppo", "ppo.yaml", strikes=[Strike(REWARD, 40, KILL)])
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    if name == "pointers":  # config.yaml, the newest checkpoint and the logs are enough
        for file in (run / "checkpoints" / "latest", run / "checkpoints" / "best", run / ".lock"):
            file.unlink()
    else:
        (newest / name).write_bytes((newest / name).read_bytes()[:-1])
    ended = warm.run(tmp_path, "resume", "runs/run")
    said = "" if name == "pointers" else f"{newest.name}/{name}"
    assert ended.code == 0 and said in ended.stderr and ended.stderr.count("\n") == bool(said)
    assert_equal(run, uninterrupted)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama", {"adapter": None}),
        (LSTM, {"adapter": None}),
        ("llama", {"critic": {"kind": "adapter"}}),
        ("llama", {"critic": {"kind": "separate", "learning_rate": 0.003}}),
    ],
    ids=["no adapter", "an LSTM", "critic's adapter", "separate critic"],
)
def test_whatever_is_trained_is_resumed(tmp_path, warm, family: str, policy: dict[str, Any]):
    write_base(tmp_path / "base", family=family)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    runs = [write_project(folder, tmp_path / "base", policy=policy) for folder in folders]
    assert warm.run(folders[0], "ppo", "ppo.yaml").code == 0
    assert warm.run(folders[1], "ppo", "ppo.yaml", strikes=[Strike(STEP, 15, KILL)]).code == -signal.SIGKILL
    assert warm.run(folders[1], "resume", "runs/run").code == 0
    assert_equal(runs[1], outcome(runs[0]))

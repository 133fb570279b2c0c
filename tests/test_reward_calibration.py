"""What a reward model's run leaves at its end: how far its predictions are what people said, as numbers and as a plot."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest

from surefoot import RewardModel
from tests.inputs import fill_disk, model_folder, refusal
from tests.test_reward_model import FAST, PAIRS, RATINGS

pytestmark = pytest.mark.usefixtures("in_own_folder")


def test_a_run_on_pairs_leaves_probabilities_beside_what_people_chose():
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 1, "learning_rate": 1e-4}).learn()
    assert model.data is not None and model.run_folder is not None
    assert model.evaluate()["eval/accuracy"] < 1  # some it has wrong, and is sure of all the same
    left = json.loads((model.run_folder / "calibration.json").read_text())
    prompts = [one.prompt for one in model.data.held_out]
    chosen, rejected = (model.score(prompts, [one.texts[side] for one in model.data.held_out]) for side in (0, 1))
    differences = [model.policy.scale * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    probabilities = [1 / (1 + math.exp(-abs(d))) for d in differences]
    (only,) = left["bins"]  # so few pairs make one bin
    assert only["predicted"] == pytest.approx(statistics.fmean(probabilities), abs=1e-5)
    assert only["observed"] == pytest.approx(model.evaluate()["eval/accuracy"]) and only["count"] == len(prompts)
    assert left["calibration_error"] == pytest.approx(abs(only["predicted"] - only["observed"]))
    assert (left["kind"], left["texts"]) == ("pairs", "held-out")


def test_a_run_on_ratings_predicts_them_in_the_raters_units():
    data = [{**row, "rating": 10 * row["rating"] + 500} for row in RATINGS]
    model = RewardModel(model_folder(), data, **FAST | {"held_out": 0.5, "epochs": 20}).learn()
    assert model.data is not None and model.run_folder is not None
    left = json.loads((model.run_folder / "calibration.json").read_text())
    ratings = [one.label for one in model.data.held_out]
    seen = sum(row["observed"] * row["count"] for row in left["bins"]) / len(ratings)
    assert left["kind"] == "ratings" and seen == pytest.approx(statistics.fmean(ratings))
    low, high = left["bins"][0], left["bins"][-1]
    assert low["predicted"] == pytest.approx(480, abs=5) and high["predicted"] == pytest.approx(528, abs=5)
    assert left["calibration_error"] < 3


@pytest.mark.parametrize("data", [PAIRS, RATINGS], ids=["pairs", "ratings"])
def test_the_plot_is_drawn_where_matplotlib_is_and_left_out_where_it_is_not(monkeypatch, data):
    pytest.importorskip("matplotlib")
    settings = FAST | {"epochs": 1, "run_folder": "runs"}
    RewardModel(model_folder(), data, run_name="drawn", **settings).learn()
    assert Path("runs/drawn/calibration.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "matplotlib" else find(name, *given))
    RewardModel(model_folder(), data, run_name="bare", **settings).learn()
    assert Path("runs/bare/calibration.json").exists() and not Path("runs/bare/calibration.png").exists()


def test_a_plot_that_fails_does_not_cost_the_model_and_a_full_disk_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr("surefoot.api.reward_model.draw_calibration", fail)
    model = RewardModel(model_folder(), PAIRS, run_name="run", **FAST | {"epochs": 1}).learn()
    assert capsys.readouterr().err == "surefoot: calibration.png could not be drawn: numpy.core.multiarray failed to import\n"
    assert model.is_finished and Path("runs/run/calibration.json").exists()
    fill_disk(monkeypatch, "calibration.json")
    refusal(lambda: model.learn(1), "runs/run/calibration.json", "No space left on device")


def test_with_fewer_than_two_held_out_rows_the_training_rows_calibrate():
    for held_out in (0.0, 1e-9):
        model = RewardModel(model_folder(), RATINGS, **FAST | {"held_out": held_out, "epochs": 1}).learn()
        assert model.data is not None and len(model.data.held_out) == (held_out > 0) and model.run_folder is not None
        before = (model.run_folder / "calibration.json").read_bytes()
        assert json.loads(before)["texts"] == "training" and model.policy.scale != 1
    model.learn(1)  # learning on writes it again
    assert (model.run_folder / "calibration.json").read_bytes() != before

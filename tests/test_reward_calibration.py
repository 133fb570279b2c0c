"""What a reward model's run leaves at its end: how far its predictions are what people said, as numbers and as a plot."""

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from surefoot import RewardModel
from tests.inputs import fill_disk, model_folder, refusal
from tests.test_reward_model import FAST, PAIRS, RATINGS

pytestmark = pytest.mark.usefixtures("in_own_folder")


def calibration(model: RewardModel) -> dict[str, Any]:
    return json.loads(((model.run_folder or Path()) / "calibration.json").read_text())


def test_a_run_on_pairs_leaves_probabilities_beside_what_people_chose():
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 1, "learning_rate": 1e-4}).learn()
    left, held_out, accuracy = calibration(model), model.data.held_out, model.evaluate()["eval/accuracy"]
    assert accuracy < 1  # some it has wrong, and is sure of all the same
    chosen, rejected = (model.score([p.prompt for p in held_out], [p.texts[side] for p in held_out]) for side in (0, 1))
    differences = [model.policy.scale * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    (only,) = left["bins"]  # so few pairs make one bin
    assert only["predicted"] == pytest.approx(statistics.fmean(1 / (1 + math.exp(-abs(d))) for d in differences), abs=1e-5)
    assert only["observed"] == pytest.approx(accuracy) and only["count"] == len(held_out)
    assert left["calibration_error"] == pytest.approx(abs(only["predicted"] - only["observed"]))
    assert (left["kind"], left["texts"]) == ("pairs", "held-out")


def test_a_run_on_ratings_predicts_them_in_the_raters_units():
    data = [{**row, "rating": 10 * row["rating"] + 500} for row in RATINGS]
    model = RewardModel(model_folder(), data, **FAST | {"held_out": 0.5, "epochs": 20}).learn()
    left, ratings = calibration(model), [one.label for one in model.data.held_out]
    seen = sum(row["observed"] * row["count"] for row in left["bins"]) / len(ratings)
    assert left["kind"] == "ratings" and seen == pytest.approx(statistics.fmean(ratings))
    low, high = left["bins"][0], left["bins"][-1]
    assert low["predicted"] == pytest.approx(480, abs=5) and high["predicted"] == pytest.approx(528, abs=5)
    assert left["calibration_error"] < 3


@pytest.mark.parametrize("data", [PAIRS, RATINGS], ids=["pairs", "ratings"])
def test_the_plot_is_drawn_where_matplotlib_is_and_left_out_where_it_is_not(monkeypatch, data):
    pytest.importorskip("matplotlib")
    model = RewardModel(model_folder(), data, run_name="run", **FAST | {"epochs": 1}).learn()
    assert Path("runs/run/calibration.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "matplotlib" else find(name, *given))
    Path("runs/run/calibration.png").unlink()
    model.learn(1)
    assert not Path("runs/run/calibration.png").exists()


def test_a_plot_that_fails_does_not_cost_the_model_and_a_full_disk_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr("surefoot.api.reward_model.draw_calibration", fail)
    model = RewardModel(model_folder(), PAIRS, run_name="run", **FAST | {"epochs": 1}).learn()
    said = capsys.readouterr().err
    assert "calibration.png" in said and "multiarray" in said and said.count("\n") == 1
    assert model.is_finished and calibration(model)
    fill_disk(monkeypatch, "calibration.json")
    refusal(lambda: model.learn(1), "runs/run/calibration.json", "No space left on device")


@pytest.mark.parametrize("held_out", [0.0, 1e-9])
def test_with_fewer_than_two_held_out_rows_the_training_rows_calibrate(held_out):
    model = RewardModel(model_folder(), RATINGS, **FAST | {"held_out": held_out, "epochs": 1}).learn()
    before = calibration(model)
    assert len(model.data.held_out) == (held_out > 0) and before["texts"] == "training" and model.policy.scale != 1
    assert calibration(model.learn(1)) != before  # learning on writes it again

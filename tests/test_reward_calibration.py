"""What a reward model's run leaves at its end: how far its predictions are what people said, as numbers and as a plot."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from surefoot import RewardModel
from surefoot.core.preference import reliability
from tests.inputs import fill_disk, model_folder, refusal
from tests.test_reward_model import FAST, PAIRS, RATINGS

pytestmark = pytest.mark.usefixtures("in_own_folder")


def test_bins_and_their_error_by_hand():
    # Two bins of ten: predictions .1 (observed 0, 2 of 10 are 1) and .9 (all are 1), given in no order.
    predicted = torch.tensor([0.9, 0.1] * 10)
    observed = torch.tensor([1.0, 1.0, 1.0, 1.0] + [1.0, 0.0] * 8)
    rows, error = reliability(predicted, observed)
    assert [row["predicted"] for row in rows] == pytest.approx([0.1, 0.9])
    assert [row["observed"] for row in rows] == pytest.approx([0.2, 1.0]) and [row["count"] for row in rows] == [10, 10]
    # Of two ones in ten the sample variance is (2 · .8² + 8 · .2²) / 9 = 1.6 / 9.
    assert [row["standard_error"] for row in rows] == pytest.approx([math.sqrt(1.6 / 9 / 10), 0.0])
    assert error == pytest.approx(0.1)
    assert len(reliability(predicted[:9], observed[:9])[0]) == 1 and len(reliability(predicted, observed, bins=1)[0]) == 1
    many = torch.linspace(0, 1, 1000)
    rows, error = reliability(many, many)
    assert len(rows) == 10 and error == pytest.approx(0, abs=1e-6)


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
    # Without held-out texts it says so, and learning on writes it again.
    model = RewardModel(model_folder(), data, **FAST | {"held_out": 0.0, "epochs": 1}).learn()
    assert model.run_folder is not None
    before = (model.run_folder / "calibration.json").read_bytes()
    assert json.loads(before)["texts"] == "training"
    model.learn(1)
    assert (model.run_folder / "calibration.json").read_bytes() != before


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


def test_a_plot_that_fails_does_not_cost_the_model(monkeypatch, capsys):
    def fail(*_):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr("surefoot.api.reward_model.draw_calibration", fail)
    model = RewardModel(model_folder(), PAIRS, run_name="run", **FAST | {"epochs": 1}).learn()
    assert capsys.readouterr().err == ("surefoot: calibration.png could not be drawn: numpy.core.multiarray failed to import\n")
    assert model.is_finished and Path("runs/run/calibration.json").exists()


def test_a_full_disk_is_one_line(monkeypatch):
    fill_disk(monkeypatch, "calibration.json")
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 1})
    assert refusal(model.learn) == "runs/reward-model-1/calibration.json could not be written: No space left on device"

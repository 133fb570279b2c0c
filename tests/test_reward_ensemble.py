"""A reward model of several heads: each learns from its own half, they disagree where they do not know, and it all resumes."""

from __future__ import annotations

import functools
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surefoot import RewardModel
from surefoot.config import PPOConfig, RewardModelConfig
from surefoot.core.preference import deviation_over_heads, ensemble_loss, preference_loss, rating_loss
from surefoot.data.preferences import PreferenceDataset
from surefoot.policies.lm.reward_model import RewardModelPolicy, saved_heads
from surefoot.rollout.preferences import PreferenceRollout, RewardScorer
from surefoot.train.update import TokenBudget, accumulate_gradient, make_optimizer
from tests.inputs import model_folder, refusal
from tests.test_reward_model import FAST, KILL, PAIRS, RATINGS, STEP, write_project
from tests.tiny import tiny_policy
from tests.train.small_run import assert_equal, outcome, rows
from tests.train.warm import Strike, cold

NAN = math.nan
FOUR: dict[str, Any] = FAST | {"heads": 4}


pytestmark = pytest.mark.usefixtures("in_own_folder")


def rollout_of(heads: int, *, data: Any = RATINGS, seed: int = 0, **settings: Any) -> PreferenceRollout:
    policy = RewardModelPolicy(tiny_policy(), seed=3, heads=heads)
    config = RewardModelConfig(heads=heads, **settings)
    return PreferenceRollout(policy, PreferenceDataset(data, held_out=0.0), settings=config, seed=seed)


def test_the_loss_of_an_ensemble_by_hand():
    # Head 0 is shown the first text alone, head 1 both: ½ (1 - 0)² · 2 / 2 heads, and head 1's ½ (3 - 1)² and ½ (0 - 2)².
    scores = torch.tensor([[[1.0, 3.0]], [[7.0, 0.0]]])
    labels = torch.tensor([[[0.0, 1.0]], [[NAN, 2.0]]])
    assert ensemble_loss(scores, labels, loss=rating_loss).tolist() == [0.5 + 2.0, 2.0]
    # Pairs: -log σ(chosen - rejected - margin), ln 2 where they differ by the margin.
    pairs = torch.tensor([[[2.0, 5.0], [1.0, 0.0]]])
    found = ensemble_loss(pairs, torch.tensor([[[1.0, NAN]]]), loss=preference_loss)
    assert float(found) == pytest.approx(math.log(2))
    assert deviation_over_heads(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist() == [1.0, 0.0]


def test_a_head_that_would_learn_from_nothing_is_refused():
    few = [{"text": f"film {n}", "rating": n} for n in range(2)]
    assert refusal(lambda: rollout_of(32, data=few)).startswith(
        "reward_model.heads: 32 heads each learn from their own half of the preferences, and of 2 none falls to one of them"
    )


def test_each_head_is_shown_its_own_half_and_the_same_in_every_epoch():
    rollout = rollout_of(4, data=[{"text": f"film {n}", "rating": n} for n in range(400)], batch_size=400)
    shown = []
    for first in (0, 400):
        batch = rollout.collect(first=first, count=400)
        assert batch.labels_B is not None and batch.labels_B.shape == (400, 1, 4)
        order = [rollout.data.training_index(number, 0) for number in range(first, first + 400)]
        shown.append(dict(zip(order, (~batch.labels_B[:, 0].isnan()).tolist(), strict=True)))
    assert shown[0] == shown[1]
    table = torch.tensor([shown[0][n] for n in range(400)]).double()
    assert bool(((table.mean(0) - 0.5).abs() < 0.1).all())
    both = (table.T @ table) / 400  # of two heads independent: a quarter
    assert bool(((both - 0.25).abs() < 0.07)[~torch.eye(4, dtype=torch.bool)].all())
    other = rollout_of(4, data=[{"text": f"film {n}", "rating": n} for n in range(400)], batch_size=400, seed=1)
    assert other.collect(first=0, count=400).labels_B is not None
    assert rollout_of(1).collect(first=0, count=8).labels_B.shape == (8,)  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [RATINGS, PAIRS], ids=["ratings", "pairs"])
def test_a_heads_gradient_is_that_of_a_single_head_on_its_own_half(data):
    """The twin: one policy a head, whose head is that one, on the rows it was shown, counted double."""
    rollout = rollout_of(3, data=data, center=0.1)
    policy: Any = rollout.policy
    batch = rollout.collect(first=0, count=12)
    assert batch.labels_B is not None
    assert bool(batch.labels_B.isnan().any())
    gradients = []
    for tokens in (10_000, 40):  # whole, and split into micro-batches
        accumulate_gradient(
            policy,
            batch,
            torch.arange(12),
            config=PPOConfig(),
            optimizer=make_optimizer(policy, PPOConfig()),
            budget=TokenBudget(tokens),
        )
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])
    weight = policy.trunk.value_head.weight.detach()
    base = functools.partial(preference_loss, center=0.1) if data is PAIRS else rating_loss
    trunk = {name: torch.zeros_like(g) for name, g in gradients[0].items() if not name.startswith("value_head")}
    for head in range(3):
        single = RewardModelPolicy(tiny_policy(), seed=0)
        with torch.no_grad():
            single.trunk.value_head.weight.copy_(weight[head : head + 1])
        part = batch.rows((~batch.labels_B[:, 0, head].isnan()).nonzero().flatten())
        losses_B = base(single.evaluate(part).values_BT, part.labels_B[:, 0, head])  # type: ignore[index]
        (2 * losses_B.sum() / 12 / 3).backward()
        assert torch.allclose(single.trunk.value_head.weight.grad, gradients[0]["value_head.weight"][head], atol=1e-5)  # type: ignore[arg-type]
        for name, p in single.trunk.lm.named_parameters():
            if name in trunk and p.grad is not None:
                trunk[name] += p.grad
    assert all(torch.allclose(value, gradients[0][name], atol=1e-5) for name, value in trunk.items())


def test_heads_agree_on_what_they_have_learned_and_less_elsewhere():
    model = RewardModel(model_folder(), RATINGS, **FOUR | {"heads": 8, "epochs": 20}).learn()
    seen = model.uncertainty([""] * len(RATINGS), [one["text"] for one in RATINGS])
    strange = ["q" * 30, "9 9 9 9", "why? why?", "zzz zzz zz", "x-ray 4:0", "jjjjjj", "0: 1: 2:", "wxyz wxyz"]
    elsewhere = model.uncertainty([""] * 8, strange)
    assert sum(elsewhere) / 8 > 3 * sum(seen) / len(seen)


def test_heads_that_differ_by_a_constant_do_not_disagree():
    model = RewardModel(model_folder(), PAIRS, **FOUR | {"epochs": 1}).learn()
    texts = ["film 3", "a", ""], [" is good", "b", "film 9 is worst"]
    rollout = model._prepare_training().rollout
    assert isinstance(rollout, PreferenceRollout)
    rollout.calibrate()
    before = model.score(*texts), model.uncertainty(*texts)
    with torch.no_grad():
        model.policy.trunk.value_head.bias += torch.tensor([0.0, 5.0, -3.0, 100.0])
    rollout.calibrate()
    assert model.score(*texts) == pytest.approx(before[0], abs=1e-4)
    assert model.uncertainty(*texts) == pytest.approx(before[1], abs=1e-4)


def test_the_score_is_the_mean_and_the_uncertainty_the_deviation_also_after_a_save():
    model = RewardModel(model_folder(), PAIRS, **FOUR | {"epochs": 2}).learn()
    texts = ["film 3", "a", ""], [" is good", "b", "film 9 is worst"]
    scores, unsure = torch.tensor(model.score(*texts)), torch.tensor(model.uncertainty(*texts))
    by_head = RewardScorer(model.policy).by_head(*texts)
    assert by_head.shape == (3, 4) and bool((unsure > 0).all())
    assert torch.allclose(by_head.mean(1).float(), scores) and torch.allclose(by_head.std(1, correction=0).float(), unsure)
    lowered = torch.tensor(model.lower_bound(2.0)(*texts))
    assert torch.allclose(lowered, scores - 2 * unsure, atol=1e-6)
    model.save("out")
    loaded = RewardModel.load("out")
    assert loaded.score(*texts) == pytest.approx(model.score(*texts), abs=1e-4)
    assert loaded.uncertainty(*texts) == pytest.approx(model.uncertainty(*texts), abs=1e-4)
    assert loaded.lower_bound()(*texts) == pytest.approx((scores - unsure).tolist(), abs=1e-4)
    assert loaded.uncertainty([], []) == loaded.lower_bound()([], []) == []


def test_one_head_knows_no_uncertainty():
    model = RewardModel(model_folder(), PAIRS, **FAST | {"epochs": 1}).learn()
    said = "uncertainty: this reward model has one head, which knows none; train one with reward_model.heads: 8"
    assert refusal(lambda: model.uncertainty(["a"], ["b"])) == said
    assert refusal(model.lower_bound) == said
    assert refusal(lambda: RewardModel(model_folder(), PAIRS, **FAST | {"heads": 0})).startswith(
        "RewardModel(...): reward_model.heads: should be greater than or equal to 1, got 0"
    )
    assert "less than or equal to 32" in refusal(lambda: RewardModel(model_folder(), PAIRS, **FAST | {"heads": 33}))


def test_with_the_gradient_stopped_the_heads_alone_learn():
    settings = FOUR | {"critic": {"stop_gradient": True}, "learning_rate": 0.03, "epochs": 10}
    model = RewardModel(model_folder(), PAIRS, **settings)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters_to_train()}
    model.learn()
    moved = {name for name, p in model.policy.named_parameters_to_train() if not torch.equal(p, before[name])}
    assert moved == {"value_head.weight"}  # of a pair's difference the bias is no part
    losses = [row["eval/loss"] for row in rows(model.run_folder or Path()) if "eval/loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    again = RewardModel.load(model.run_folder or "", PAIRS, verbose=0)
    assert again.uncertainty(["a"], ["b"]) == model.uncertainty(["a"], ["b"])


def test_a_damaged_head_is_one_line():
    model = RewardModel(model_folder(), PAIRS, **FOUR | {"epochs": 1}).learn()
    model.save("out")
    file = Path("out/surefoot_reward.safetensors")
    save_file({"shift": torch.zeros(())}, file)
    assert refusal(lambda: RewardModel.load("out")).startswith(f"{file} has no heads of a reward model; train it again")


@pytest.mark.parametrize("stop_gradient", [False, True], ids=["adapter", "heads alone"])
def test_a_killed_and_resumed_ensemble_is_the_one_that_was_not(tmp_path, base, warm, stop_gradient):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    policy = {"critic": {"stop_gradient": stop_gradient}}
    runs = [write_project(folder, base, policy=policy, reward_model={"heads": 3}) for folder in folders]
    assert warm.run(folders[0], "reward-model", "reward.yaml").code == 0
    assert warm.run(folders[1], "reward-model", "reward.yaml", strikes=[Strike(STEP, 4, KILL)]).code == -signal.SIGKILL
    assert cold(folders[1], "resume", "runs/run").code == 0
    assert_equal(runs[1], outcome(runs[0]))
    assert saved_heads(runs[0] / "model") == 3

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surefoot import PPO
from surefoot.errors import GateError, NonFiniteError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train import loop
from surefoot.train.checkpoint import load_checkpoint, newest_checkpoint
from surefoot.types import Batch, Evaluation
from tests.golden import refused
from tests.train.small_run import python_ppo, rows, weights

STEPS_AN_UPDATE = 4


def saved(model: PPO) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    path = newest_checkpoint((model.run_folder or Path()) / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def steps_in(tensors: dict[str, dict[str, torch.Tensor]]) -> set[float]:
    return {float(tensor) for name, tensor in tensors["optimizer"].items() if name.endswith("/step")}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


# Losses that are not finite
def spoil(monkeypatch: pytest.MonkeyPatch, is_spoiled: Callable[[int], bool]) -> None:
    """Make what the policy computes for training NaN at some of the calls with a gradient, numbered from 1."""
    evaluate, calls = CausalLMPolicy.evaluate, 0

    def spoiled(self: CausalLMPolicy, batch: Batch, **keywords: Any) -> Evaluation:
        nonlocal calls
        view = evaluate(self, batch, **keywords)
        calls += torch.is_grad_enabled()
        return replace(view, logprobs_BT=view.logprobs_BT * math.nan) if is_spoiled(calls) else view

    monkeypatch.setattr(CausalLMPolicy, "evaluate", spoiled)


# Every optimizer step is one call of `evaluate`.
ONE_MICRO_BATCH: dict[str, dict[str, Any]] = {"ppo": {"micro_batch_tokens": 10_000}, "evaluate": {"every": None}}


def test_a_step_with_a_non_finite_loss_is_skipped_and_counted(tmp_path, base, monkeypatch):
    spoil(monkeypatch, lambda call: call in (6, 7, 12))
    model = python_ppo(base, tmp_path, **ONE_MICRO_BATCH).learn(4 * 6)
    skipped = [row["ppo/skipped_steps"] for row in rows(model.run_folder or Path()) if "ppo/skipped_steps" in row]
    assert skipped == [0, 2, 3, 3]
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    tensors, state = saved(model)
    assert state["progress"]["bad_steps"] == 3 and state["progress"]["bad_steps_in_a_row"] == 0
    assert steps_in(tensors) == {4 * STEPS_AN_UPDATE - 3}


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint(tmp_path, base, monkeypatch):
    # Bad from the third step of the second update: two there, four in the third, past the limit of five.
    spoil(monkeypatch, lambda call: call > STEPS_AN_UPDATE + 2)
    model = python_ppo(base, tmp_path, **ONE_MICRO_BATCH)
    with refused("6 optimizer steps", error=NonFiniteError):
        model.learn()
    assert NonFiniteError.exit_code == 3
    tensors, state = saved(model)
    assert state["progress"]["updates"] == 3 and state["progress"]["bad_steps_in_a_row"] == 6
    assert same(tensors["policy"], weights(model))
    assert all(tensor.isfinite().all() for contents in tensors.values() for tensor in contents.values())
    assert steps_in(tensors) == {STEPS_AN_UPDATE + 2}


# The start-up gate
def dropout_left_on(model: PPO, batch: Batch) -> None:
    layers = [module for module in model.policy.lm.modules() if isinstance(module, torch.nn.Embedding)]
    layers[0].register_forward_hook(lambda module, inputs, output: torch.nn.functional.dropout(output, 0.1))


def temperature_on_one_side(model: PPO, batch: Batch) -> None:
    batch.temperature *= 0.9


def weights_changed(model: PPO, batch: Batch) -> None:
    with torch.no_grad():
        for _, parameter in model.policy.named_parameters_to_train():
            parameter.add_(0.01)


def tamper_with(monkeypatch: pytest.MonkeyPatch, model: PPO, tamper: Callable[[PPO, Batch], None]) -> list[Any]:
    """Do that before every update's training; the weights after each."""
    train_on, tampered = loop.train_on, []

    def tampered_train_on(t: loop.Training, batch: Batch, **keywords: Any) -> Any:
        tamper(model, batch)
        tampered.append(weights(model))
        return train_on(t, batch, **keywords)

    monkeypatch.setattr(loop, "train_on", tampered_train_on)
    return tampered


@pytest.mark.parametrize("tamper", [dropout_left_on, temperature_on_one_side, weights_changed])
def test_a_policy_that_is_not_the_one_that_sampled_is_not_trained(tmp_path, base, monkeypatch, tamper):
    model = python_ppo(base, tmp_path)
    tampered = tamper_with(monkeypatch, model, tamper)
    with refused("dropout", "temperature", error=GateError):
        model.learn()
    assert GateError.exit_code == 2
    assert same(weights(model), tampered[0])
    tensors, state = saved(model)
    assert tensors["optimizer"] == {} and state["progress"]["updates"] == 0
    assert not [row for row in rows(model.run_folder or Path()) if "ppo/policy_loss" in row]


def test_the_gate_looks_again_when_a_run_is_resumed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = python_ppo(base, tmp_path).learn(6)
    before = weights(model)
    tamper_with(monkeypatch, model, temperature_on_one_side)
    with pytest.raises(GateError):
        model.learn(6)
    assert same(weights(model), before) and same(saved(model)[0]["policy"], before)

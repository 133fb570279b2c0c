"""The step of supervised fine-tuning: its gradient is transformers' own, and what it may depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import SFTConfig
from surefoot.core.losses import NLLStats
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train.objective import OptimizerSettings, UpdateResult
from surefoot.train.supervised_objectives import NLLObjective
from surefoot.train.update import make_optimizer, update
from surefoot.types import Batch
from tests.tiny import random_tokens, tiny_policy

NLL = NLLObjective(OptimizerSettings.of(SFTConfig(batch_size=6, learning_rate=1e-3)))
# (all tokens, how many are asked): some trained whole but for the first token, some at their end alone.
LENGTHS = ((9, 1), (4, 3), (14, 5), (2, 1), (14, 13), (7, 2))
ROWS = torch.arange(len(LENGTHS))


def demonstrated(columns: int = 0) -> Batch:
    """Six ragged rows, one of them with a second piece that is trained, and `columns` more of padding."""
    rows = [(random_tokens(n, seed=b), [t >= asked for t in range(n)]) for b, (n, asked) in enumerate(LENGTHS)]
    rows[2][1][8:10] = [False, False]  # between two completions of a chat
    batch = demonstration_batch(rows, device=torch.device("cpu"))
    if not columns:
        return batch
    changes: dict[str, Any] = {
        field.name: torch.nn.functional.pad(value, (0, columns))
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    observations = {"tokens": changes["actions_BT"], "lengths": batch.observations["lengths"]}
    return dataclasses.replace(batch, **changes, observations=observations)


def gradients(policy: CausalLMPolicy, batch: Batch, tokens: int = 10**6) -> tuple[dict[str, Tensor | None], NLLStats]:
    parameters = dict(policy.named_parameters_to_train())
    make_optimizer(policy).zero_grad()
    stats = NLL.gradient(policy, batch, ROWS, token_budget=tokens)
    return {name: p.grad for name, p in parameters.items()}, stats


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert float((other - value).norm()) <= 1e-5 * float(value.norm()), name  # the order of sums


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_gradient_is_that_of_transformers_own_loss(adapter):
    policy, batch = tiny_policy(adapter=adapter, moved=True), demonstrated()
    found, stats = gradients(policy, batch)
    for _, parameter in policy.named_parameters_to_train():
        parameter.grad = None
    attention = torch.arange(14) < batch.observations["lengths"][:, None]
    labels = batch.actions_BT.masked_fill(~batch.mask_BT, -100)
    loss = policy.lm(input_ids=batch.actions_BT, attention_mask=attention.long(), labels=labels).loss
    loss.backward()
    assert_close(found, {name: p.grad for name, p in policy.named_parameters_to_train()})
    assert float(stats.nll / stats.num_tokens) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert int(stats.num_tokens) == int(batch.mask_BT.sum())


def test_the_critic_is_left_alone():
    policy = tiny_policy(moved=True)
    found, _ = gradients(policy, demonstrated())
    assert found["value_head.weight"] is None and found["value_head.bias"] is None
    before = policy.value_head.weight.clone()
    update(policy, demonstrated(), NLL)
    assert torch.equal(policy.value_head.weight, before)


@pytest.mark.parametrize("tokens", [1, 14, 28, 40, 70])
def test_micro_batches_do_not_change_the_gradient(tokens):
    policy, batch = tiny_policy(moved=True), demonstrated()
    expected, whole = gradients(policy, batch)
    found, split = gradients(policy, batch, tokens)
    assert len(micro_batches(batch, ROWS, tokens)) > 1
    assert_close(found, expected)
    assert [float(v) for v in vars(split).values()] == pytest.approx([float(v) for v in vars(whole).values()], rel=1e-5)


def test_rows_of_like_length_stand_together():
    lengths = [max(LENGTHS[row][0] for row in rows) for rows in micro_batches(demonstrated(), ROWS, 28)]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3


@pytest.mark.parametrize("tokens", [30, 10**6])
def test_padding_does_not_change_the_gradient(tokens):
    policy = tiny_policy(moved=True)
    expected, _ = gradients(policy, demonstrated())
    assert_close(gradients(policy, demonstrated(columns=9), tokens)[0], expected)


def test_one_step_is_taken_on_a_batch_and_lowers_the_loss():
    policy, batch = tiny_policy(), demonstrated()
    assert NLL.prepare(batch) is batch and batch.advantages_BT is None

    def step() -> tuple[UpdateResult, dict[str, float]]:
        result = update(policy, batch, NLL)
        assert (result.steps, result.skipped) == (1, 0)
        return result, NLL.metrics(batch, result)

    result, metrics = step()
    assert metrics["sft/nll"] == pytest.approx(float(result.stats.nll) / int(batch.mask_BT.sum()))
    assert step()[1]["sft/nll"] < metrics["sft/nll"]


def test_a_step_with_a_loss_that_is_not_finite_is_skipped():
    policy = tiny_policy()
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[5] = float("nan")
    before = {name: p.detach().clone() for name, p in policy.named_parameters_to_train()}
    result = update(policy, demonstrated(), NLL)
    assert (result.steps, result.skipped) == (0, 1)
    assert NLL.metrics(demonstrated(), result) == {}
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters_to_train())


def test_the_sections_settings_are_those_of_the_update():
    given = {"batch_size": 5, "learning_rate": 1e-3, "lr_schedule": "linear", "lr_warmup": 0.2, "max_grad_norm": 0.3}
    found = OptimizerSettings.of(SFTConfig(**given, max_bad_steps=2))
    assert found == OptimizerSettings(**given, max_bad_steps=2, adam_epsilon=1e-8, micro_batch_tokens=2048, n_epochs=1)

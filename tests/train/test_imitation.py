"""The step of supervised fine-tuning: its gradient is transformers' own, and what it may depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import Config, SFTConfig
from surefoot.core.losses import LossStats, nll_loss
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train.metrics import nll_metrics
from surefoot.train.update import TokenBudget, accumulate_gradient, advantages, make_optimizer, update
from surefoot.types import Batch
from tests.fakes import config_of
from tests.tiny import random_tokens, tiny_policy

CONFIG = Config(sft=SFTConfig(batch_size=6)).algorithm
# (all tokens, how many are asked): some trained whole but for the first token, some at their end alone.
LENGTHS = ((9, 1), (4, 3), (14, 5), (2, 1), (14, 13), (7, 2))
ROWS = torch.arange(len(LENGTHS))


def demonstrated(columns: int = 0) -> Batch:
    """Six ragged rows, one of them with a second piece to imitate, and `columns` more of padding."""
    rows = [(random_tokens(n, seed=b), [t >= asked for t in range(n)]) for b, (n, asked) in enumerate(LENGTHS)]
    rows[2][1][8:10] = [False, False]  # between two answers of a chat
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


def gradients(policy: CausalLMPolicy, batch: Batch, tokens: int = 10**6) -> tuple[dict[str, Tensor | None], LossStats]:
    optimizer = make_optimizer(policy, CONFIG)
    stats = accumulate_gradient(policy, batch, ROWS, config=CONFIG, optimizer=optimizer, budget=TokenBudget(tokens))
    return {name: p.grad for name, p in policy.named_parameters_to_train()}, stats


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
    assert float(stats.policy_loss / stats.steps) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert int(stats.steps) == int(batch.mask_BT.sum())


def test_the_critic_is_left_alone():
    policy = tiny_policy(moved=True)
    found, _ = gradients(policy, demonstrated())
    assert found["value_head.weight"] is None and found["value_head.bias"] is None
    before = policy.value_head.weight.clone()
    update(policy, demonstrated(), config=CONFIG)
    assert torch.equal(policy.value_head.weight, before)


@pytest.mark.parametrize("tokens", [1, 14, 28, 40, 70])
def test_micro_batches_do_not_change_the_gradient(tokens):
    policy, batch = tiny_policy(moved=True), demonstrated()
    expected, whole = gradients(policy, batch)
    found, split = gradients(policy, batch, tokens)
    assert len(micro_batches(batch, ROWS, tokens)) > 1
    assert_close(found, expected)
    assert torch.allclose(split.sums, whole.sums, rtol=1e-5)


def test_rows_of_like_length_stand_together():
    lengths = [max(LENGTHS[row][0] for row in rows) for rows in micro_batches(demonstrated(), ROWS, 28)]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3


@pytest.mark.parametrize("tokens", [30, 10**6])
def test_padding_does_not_change_the_gradient(tokens):
    policy = tiny_policy(moved=True)
    expected, _ = gradients(policy, demonstrated())
    assert_close(gradients(policy, demonstrated(columns=9), tokens)[0], expected)


def test_what_is_masked_is_inert():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0]], requires_grad=True)
    poisoned = torch.where(mask, logprobs, float("nan")).detach().requires_grad_()
    for values in (logprobs, poisoned):
        loss, stats = nll_loss(values, torch.where(mask, 0.5, float("nan")), mask_BT=mask, denominator=4)
        assert float(loss.detach()) == pytest.approx(5.5 / 4)
        (gradient,) = torch.autograd.grad(loss, values)
        assert torch.equal(gradient, torch.where(mask, -0.25, 0.0))
        assert stats.sums.tolist() == [5.5, 0.0, 1.5, 3.0, 0.0, 0.0, 0.0, 3.0] and float(stats.ratio_max) == 1.0


def test_one_step_is_taken_on_a_batch_and_advantages_leave_it_as_it_is():
    policy, batch = tiny_policy(), demonstrated()
    assert advantages(batch) is batch and batch.advantages_BT is None
    result = update(policy, batch, config=CONFIG, learning_rate=1e-3)
    assert (result.steps, result.skipped) == (1, 0) and result.stats is not None
    metrics = nll_metrics(result, learning_rate=1e-3, skipped=0)
    assert metrics["sft/nll"] == pytest.approx(float(result.stats.policy_loss) / int(batch.mask_BT.sum()))
    again = nll_metrics(update(policy, batch, config=CONFIG), learning_rate=1e-3, skipped=0)
    assert again["sft/nll"] < metrics["sft/nll"]


def test_a_step_with_a_loss_that_is_not_finite_is_skipped():
    policy = tiny_policy()
    optimizer = make_optimizer(policy, CONFIG)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight[5] = float("nan")
    before = {name: p.detach().clone() for name, p in policy.named_parameters_to_train()}
    result = update(policy, demonstrated(), optimizer=optimizer, config=CONFIG)
    assert (result.steps, result.skipped) == (0, 1)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters_to_train())


def test_the_sections_settings_are_those_of_the_update():
    config = SFTConfig(
        batch_size=5, learning_rate=1e-3, lr_schedule="linear", lr_warmup=0.2, max_grad_norm=0.3, max_bad_steps=2
    )
    expected = config_of(
        batch_size=5,
        learning_rate=1e-3,
        lr_schedule="linear",
        lr_warmup=0.2,
        max_grad_norm=0.3,
        max_bad_steps=2,
        adam_epsilon=1e-8,
        micro_batch_tokens=2048,
        n_epochs=1,
    ).ppo
    assert config.as_update() == expected

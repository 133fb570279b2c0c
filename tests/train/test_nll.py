"""The step of supervised fine-tuning: its gradient is transformers' own, and what it may depend on."""

import math

import pytest
import torch
from torch import Tensor

from surefoot.config import SFTConfig
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.train.objective import UpdateResult
from surefoot.train.supervised_objectives import NLLObjective
from surefoot.types import Batch
from tests.fakes import CPU, assert_close, named_gradient, padded
from tests.tiny import random_tokens, tiny_policy

NLL = NLLObjective(SFTConfig(batch_size=6, learning_rate=1e-3))
# (all tokens, how many are asked): some trained whole but for the first token, some at their end alone.
LENGTHS = ((9, 1), (4, 3), (14, 5), (2, 1), (14, 13), (7, 2))
ROWS = torch.arange(len(LENGTHS))


def demonstrated(columns: int = 0) -> Batch:
    """Six ragged rows, one of them with a second piece that is trained, and `columns` more of padding."""
    rows = [(random_tokens(n, seed=b), [t >= asked for t in range(n)]) for b, (n, asked) in enumerate(LENGTHS)]
    rows[2][1][8:10] = [False, False]  # between two completions of a chat
    return padded(demonstration_batch(rows, device=CPU), columns, poison=math.nan)


def transformers_gradient(policy: CausalLMPolicy, batch: Batch) -> tuple[dict[str, Tensor], float]:
    """That of transformers' own loss, a mean over the labelled tokens, and the loss."""
    for _, parameter in policy.named_parameters_to_train():
        parameter.grad = None
    labels = batch.actions_BT.masked_fill(~batch.mask_BT, -100)
    attention = torch.arange(labels.shape[1]) < batch.observations["lengths"][:, None]
    loss = policy.lm(input_ids=batch.actions_BT, attention_mask=attention.long(), labels=labels).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters_to_train() if p.grad is not None}, float(loss.detach())


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_gradient_is_that_of_transformers_own_loss_and_the_critic_has_none(adapter):
    policy, batch = tiny_policy(adapter=adapter, moved=True), demonstrated()
    found, stats = named_gradient(NLL, policy, batch)
    assert NLL.metrics(batch, UpdateResult()) == {}  # of an update whose steps were all skipped
    expected, loss = transformers_gradient(policy, batch)
    assert_close(found, expected)
    assert "value_head.weight" not in found and "value_head.bias" not in found
    assert stats.mean == pytest.approx(loss, rel=1e-5)
    assert int(stats.num_tokens) == int(batch.mask_BT.sum())


@pytest.mark.parametrize(("tokens", "columns"), [(1, 0), (14, 0), (28, 0), (40, 0), (70, 0), (30, 9), (10**6, 9)])
def test_micro_batches_and_padding_do_not_change_the_gradient(tokens, columns):
    policy, batch = tiny_policy(moved=True), demonstrated(columns)
    expected, whole = named_gradient(NLL, policy, demonstrated())
    found, split = named_gradient(NLL, policy, batch, tokens)
    assert len(micro_batches(batch, ROWS, tokens)) > 1 or tokens == 10**6
    assert_close(found, expected)
    assert [float(v) for v in vars(split).values()] == pytest.approx([float(v) for v in vars(whole).values()], rel=1e-5)


def test_rows_of_like_length_stand_together():
    lengths = [max(LENGTHS[row][0] for row in rows) for rows in micro_batches(demonstrated(), ROWS, 28)]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3

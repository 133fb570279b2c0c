"""The step of a reward model: where the score is read, and what loss and gradient may depend on."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import RewardModelConfig
from surefoot.core.preference import preference_loss, rating_loss
from surefoot.data.batches import micro_batches, preference_batch
from surefoot.policies.lm.reward_model import RewardModelPolicy
from surefoot.train.supervised_objectives import PreferenceObjective
from surefoot.types import Batch
from tests.fakes import CPU, assert_close, named_gradient
from tests.tiny import FAMILIES, random_tokens, tiny_policy

SETTINGS = RewardModelConfig(batch_size=5, learning_rate=1e-3)
LENGTHS = ((9, 4), (3, 14), (2, 2), (7, 12), (1, 5))
PAIRS = PreferenceObjective(functools.partial(preference_loss, center=0.1), SETTINGS)
RATINGS = PreferenceObjective(rating_loss)


def reward_policy(family: str = "llama", *, adapter: bool = True) -> RewardModelPolicy:
    return RewardModelPolicy(tiny_policy(family, adapter=adapter, moved=True), seed=3)


def texts(row: int) -> list[tuple[int, ...]]:
    return [random_tokens(length, seed=10 * row + side) for side, length in enumerate(LENGTHS[row])]


def pairs(rows: Sequence[int] = range(len(LENGTHS))) -> Batch:
    margins = [0.0, 0.5, 0.0, 1.0, 0.0]
    return preference_batch([texts(row) for row in rows], [margins[row] for row in rows], device=CPU)


def rated() -> Batch:
    ratings = [0.3, -1.0, 2.0, 0.0, -0.5]
    return preference_batch([texts(row)[:1] for row in range(5)], ratings, device=CPU)


def padded(batch: Batch, columns: int) -> Batch:
    """The same with `columns` more of padding, which hold tokens of no meaning."""
    tokens = torch.nn.functional.pad(batch.observations["tokens"], (0, 0, 0, columns), value=7)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return dataclasses.replace(batch, mask_BT=mask, observations=batch.observations | {"tokens": tokens})


def gradients(policy: RewardModelPolicy, batch: Batch, tokens: int = 10**6) -> tuple[dict[str, Tensor], Any]:
    found, stats = named_gradient(PAIRS if batch.observations["lengths"].shape[1] == 2 else RATINGS, policy, batch, tokens)
    assert "value_head.weight" in found and len(found) > 2
    return found, stats


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_read_at_the_last_valid_token(family):
    policy, batch = reward_policy(family), pairs()
    with torch.no_grad():
        found = policy.evaluate(batch).values_BT
        for row in range(len(LENGTHS)):
            for side, tokens in enumerate(texts(row)):
                out = policy.trunk.lm(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
                expected = policy.trunk.value_head(out.hidden_states[-1][0, -1].float())
                assert float(found[row, side]) == pytest.approx(float(expected), abs=1e-5)


def test_the_head_starts_as_its_paper_says():
    policies = [RewardModelPolicy(tiny_policy(hidden_size=512), seed=seed) for seed in (0, 0, 1)]
    weight, same, other = (policy.trunk.value_head.weight.detach() for policy in policies)
    assert float(weight.std() * 513**0.5) == pytest.approx(1, abs=0.1) and abs(float(weight.mean())) < 0.01
    assert policies[0].trunk.value_head.bias.tolist() == [0] and (policies[0].shift, policies[0].scale) == (0, 1)
    assert torch.equal(weight, same) and not torch.equal(weight, other)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("batch", [pairs(), rated()], ids=["pairs", "ratings"])
def test_loss_and_gradient_are_the_mean_over_rows_taken_one_by_one(batch, adapter):
    policy = reward_policy(adapter=adapter)
    found, stats = gradients(policy, batch)
    alone = [gradients(policy, batch.rows(torch.tensor([row]))) for row in range(5)]
    assert_close(found, {name: torch.stack([gradient[name] for gradient, _ in alone]).mean(0) for name in found})
    loss = sum(float(its.loss) for _, its in alone) / 5
    assert float(stats.loss / stats.num_tokens) == pytest.approx(loss, rel=1e-5) and stats.num_tokens == 5


@pytest.mark.parametrize(("tokens", "columns"), [(1, 0), (12, 0), (30, 0), (60, 0), (30, 11), (10**6, 11)])
@pytest.mark.parametrize("batch", [pairs(), rated()], ids=["pairs", "ratings"])
def test_micro_batches_and_padding_change_neither_score_nor_gradient(batch, tokens, columns):
    policy, wide = reward_policy(), padded(batch, columns)
    with torch.no_grad():
        assert torch.allclose(*(policy.evaluate(one).values_BT for one in (batch, wide)), atol=1e-6)
    expected, whole = gradients(policy, batch)
    found, split = gradients(policy, wide, tokens)
    assert len(micro_batches(batch, torch.arange(5), tokens // batch.observations["lengths"].shape[1])) > 1 or tokens >= 60
    assert_close(found, expected)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-5)

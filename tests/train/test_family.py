"""PPO's relatives on the same batch and the same update: docs/family.md, held to numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from surefoot.config import PPOConfig
from surefoot.rollout.batch import have_signal, text_batch
from surefoot.train.metrics import batch_metrics, update_metrics
from surefoot.train.update import advantages, update
from surefoot.types import Batch
from tests.fakes import CPU, VOCABULARY, BigramPolicy, played_batch, trajectory

RAGGED = (3, 1, 4, 2, 2, 5, 3, 1)
CRITIC_FREE = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "remax")


def config_of(**settings: Any) -> PPOConfig:
    return PPOConfig(**{"batch_size": 8, "episodes_per_update": 8, "samples_per_prompt": 4, "n_epochs": 2, **settings})


def grouped_batch(policy: BigramPolicy, *, drift: float = 0.0) -> Batch:
    """Eight ragged rows, two prompts with four answers each, and a reward for each prompt's greedy answer."""
    batch = played_batch(policy, RAGGED, drift=drift)
    batch.groups_B = torch.arange(8) // 4
    batch.baselines_B = torch.tensor([0.25] * 4 + [-0.5] * 4)
    return batch


def scored(scores: list[float], lengths: list[int]) -> Batch:
    """Answers of these lengths, each with its score on its last token; log-probs are 0."""
    batch = text_batch([trajectory(prompt_tokens=[1], tokens=[2] * n) for n in lengths], device=CPU)
    batch.rewards_BT = torch.where(batch.ends_BT, torch.tensor(scores)[:, None], 0.0)
    batch.groups_B = torch.zeros(len(scores), dtype=torch.long)
    return batch


# --- advantages ---


def test_every_token_of_an_answer_has_the_answers_advantage() -> None:
    batch = advantages(scored([1.0, 0.0, 2.0], [1, 3, 2]), config_of(advantage="rloo"))
    assert batch.returns_BT is None
    assert batch.advantages_BT.tolist() == [[0, 0, 0, 0], [0, -1.5, -1.5, -1.5], [0, 1.5, 1.5, 0]]


def test_the_kl_penalty_is_part_of_the_reward_that_is_compared() -> None:
    batch = scored([1.0, 1.0], [2, 1])
    batch.reference_logprobs_BT = torch.tensor([[9.0, -1.0, -2.0], [9.0, -1.0, 9.0]])  # KL 3 and 1, and padding
    advantages(batch, config_of(advantage="dr_grpo", kl_coef=0.1))
    assert batch.advantages_BT.flatten().tolist() == pytest.approx([0, -0.1, -0.1, 0, 0.1, 0])


def test_remax_subtracts_the_greedy_answers_reward() -> None:
    batch = scored([1.0, 0.5], [2, 1])
    batch.baselines_B = torch.tensor([0.75, 0.75])
    advantages(batch, config_of(advantage="remax"))
    assert batch.advantages_BT.tolist() == [[0, 0.25, 0.25], [0, -0.25, 0]]


def test_reinforce_pp_is_the_penalised_reward_to_go_whitened_over_the_batch() -> None:
    """Scores 3 and 0 at the ends, KL 1 a token, β 1: to go are 3 - 2 and 3 - 1, and 0 - 1. Mean 2/3, variance 14/9."""
    batch = scored([3.0, 0.0], [2, 1])
    batch.reference_logprobs_BT = torch.full((2, 3), -1.0)
    advantages(batch, config_of(advantage="reinforce_pp", kl_coef=1.0))
    expected = [(to_go - 2 / 3) / math.sqrt(14 / 9) for to_go in (1.0, 2.0, -1.0)]
    assert batch.advantages_BT[batch.mask_BT].tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.advantages_BT[~batch.mask_BT].eq(0).all()


@pytest.mark.parametrize("kind", CRITIC_FREE)
@pytest.mark.parametrize("poison", [math.nan, 1e9])
def test_what_is_masked_changes_no_advantage(kind: str, poison: float) -> None:
    reference = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))
    policy = BigramPolicy(reference=reference)
    batch = grouped_batch(policy)
    batch.reference_logprobs_BT = policy.reference_logprobs(batch)
    clean = advantages(batch, config_of(advantage=kind)).advantages_BT
    names = ("logprobs_BT", "values_BT", "rewards_BT", "reference_logprobs_BT")
    changes = {name: torch.where(batch.mask_BT, getattr(batch, name), poison) for name in names}
    poisoned = advantages(dataclasses.replace(batch, **changes), config_of(advantage=kind)).advantages_BT
    assert torch.equal(poisoned, clean) and clean[~batch.mask_BT].eq(0).all()


# --- the update ---


@pytest.mark.parametrize("kind", CRITIC_FREE)
def test_without_a_critic_the_value_head_gets_no_gradient_and_the_policy_does(kind: str) -> None:
    policy, config = BigramPolicy(), config_of(advantage=kind, vf_coef=10.0)
    logits, values = policy.weights()
    result = update(policy, advantages(grouped_batch(policy, drift=0.3), config), config=config)
    assert result.steps == 2
    assert policy.values_V.grad is None and torch.equal(policy.weights()[1], values)
    assert not torch.equal(policy.weights()[0], logits)
    assert float(result.stats.value_loss) == 0.0


def test_without_a_critic_nothing_is_logged_about_one() -> None:
    policy, config = BigramPolicy(), config_of(advantage="grpo")
    batch = advantages(grouped_batch(policy), config)
    logged = batch_metrics(batch) | update_metrics(update(policy, batch, config=config))
    assert not [name for name in logged if name.startswith("critic/")]
    with_critic = advantages(grouped_batch(policy), PPOConfig())
    logged = batch_metrics(with_critic) | update_metrics(update(policy, with_critic, config=PPOConfig()))
    assert {"critic/value_mean", "critic/value_loss"} <= logged.keys()


def test_group_advantages_reach_the_loss_as_they_are() -> None:
    """Whitening them again over a minibatch would undo what the group's mean and deviation stand for."""
    gradients = []
    for normalize in (True, False):
        config = config_of(advantage="dr_grpo", normalize_advantage=normalize, n_epochs=1, max_grad_norm=1e9)
        update(policy := BigramPolicy(), advantages(grouped_batch(policy, drift=0.3), config), config=config)
        gradients.append(policy.gradients()[0])
    assert torch.equal(*gradients)


def test_groups_stay_with_their_rows_in_minibatches() -> None:
    batch = grouped_batch(BigramPolicy())
    rows = torch.tensor([6, 0, 5])
    assert batch.rows(rows).groups_B.tolist() == [1, 0, 1]
    assert batch.steps().groups_B.tolist() == [
        group for group, n in zip(batch.groups_B.tolist(), RAGGED, strict=True) for _ in range(n)
    ]


def test_groups_with_equal_rewards_are_counted() -> None:
    batch = scored([1.0, 1.0, 0.0, 1.0, 2.0, 2.0], [1, 2, 1, 1, 3, 1])
    batch.groups_B = torch.tensor([0, 0, 1, 1, 2, 2])
    batch.rewards_BT = torch.where(batch.mask_BT, batch.rewards_BT, math.nan)
    assert have_signal(batch).tolist() == [False, False, True, True, False, False]
    assert batch_metrics(batch)["reward/equal_groups"] == 2.0
    batch.groups_B = torch.arange(6)
    assert "reward/equal_groups" not in batch_metrics(batch)

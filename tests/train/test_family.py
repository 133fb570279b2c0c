"""PPO's relatives on the same batch and the same update: docs/family.md, held to numbers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import Config
from surefoot.rollout.batch import has_reward_variance, text_batch
from surefoot.train.metrics import batch_metrics
from surefoot.train.objective import UpdateResult
from surefoot.train.ppo_objective import PPOObjective, advantages
from surefoot.train.update import make_optimizer, update
from surefoot.types import Batch
from tests import fakes
from tests.fakes import CPU, VOCABULARY, BigramPolicy, gradient_of, padded, played_batch, train, trajectory
from tests.tiny import random_tokens, tiny_policy, written_batch

RAGGED = (3, 1, 4, 2, 2, 5, 3, 1)
CRITIC_FREE = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "remax")


def config_of(**settings: Any) -> Config:
    """Two epochs of the whole batch, in groups of four."""
    return fakes.config_of(**{"batch_size": 8, "n_epochs": 2, "group": {"size": 4}} | settings)


def grouped_batch(policy: BigramPolicy, *, drift: float = 0.0) -> Batch:
    """Eight ragged rows, two prompts with four completions each, and a reward for each prompt's greedy one."""
    batch = played_batch(policy, RAGGED, drift=drift)
    batch.groups_B = torch.arange(8) // 4
    batch.baselines_B = torch.tensor([0.25] * 4 + [-0.5] * 4)
    return batch


def reference_table() -> Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))


def scored(scores: list[float], lengths: list[int]) -> Batch:
    """Answers of these lengths, each with its score on its last token; log-probs are 0."""
    batch = text_batch([trajectory(prompt_tokens=[1], tokens=[2] * n) for n in lengths], device=CPU)
    batch.rewards_BT = torch.where(batch.ends_BT, torch.tensor(scores)[:, None], 0.0)
    batch.groups_B = torch.zeros(len(scores), dtype=torch.long)
    return batch


# --- advantages ---
def test_every_token_of_a_completion_has_the_completions_advantage() -> None:
    """Rewards 1, 0, 2 each against the others' mean; KL 3 and 1 at β 0.1 in what is compared; a greedy reward of 0.75."""
    batch = advantages(scored([1.0, 0.0, 2.0], [1, 3, 2]), config_of(advantage="rloo"))
    assert batch.returns_BT is None
    assert batch.advantages_BT.tolist() == [[0, 0, 0, 0], [0, -1.5, -1.5, -1.5], [0, 1.5, 1.5, 0]]
    batch = scored([1.0, 1.0], [2, 1])
    batch.reference_logprobs_BT = torch.tensor([[9.0, -1.0, -2.0], [9.0, -1.0, 9.0]])  # and padding
    advantages(batch, config_of(advantage="dr_grpo", kl={"coef": 0.1}))
    assert batch.advantages_BT.flatten().tolist() == pytest.approx([0, -0.1, -0.1, 0, 0.1, 0])
    batch = scored([1.0, 0.5], [2, 1])
    batch.baselines_B = torch.tensor([0.75, 0.75])
    assert advantages(batch, config_of(advantage="remax")).advantages_BT.tolist() == [[0, 0.25, 0.25], [0, -0.25, 0]]


def test_reinforce_pp_is_the_penalized_reward_to_go_whitened_over_the_batch() -> None:
    """Scores 3 and 0 at the ends, KL 1 a token, β 1: to go are 3 - 2 and 3 - 1, and 0 - 1. Mean 2/3, variance 14/9."""
    batch = scored([3.0, 0.0], [2, 1])
    batch.reference_logprobs_BT = torch.full((2, 3), -1.0)
    advantages(batch, config_of(advantage="reinforce_pp", kl={"coef": 1.0}))
    expected = [(to_go - 2 / 3) / math.sqrt(14 / 9) for to_go in (1.0, 2.0, -1.0)]
    assert batch.advantages_BT[batch.mask_BT].tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.advantages_BT[~batch.mask_BT].eq(0).all()


@pytest.mark.parametrize("kind", [*CRITIC_FREE, "gae"])
@pytest.mark.parametrize("poison", [math.nan, 1e9])
def test_what_is_masked_changes_no_advantage(kind: str, poison: float) -> None:
    policy = BigramPolicy(reference=reference_table())
    batch = grouped_batch(policy)
    batch.reference_logprobs_BT = policy.reference_logprobs(batch)
    config = config_of(advantage=kind, shaping={"whiten": kind == "gae"})
    clean = advantages(batch, config).advantages_BT
    names = ("logprobs_BT", "values_BT", "rewards_BT", "reference_logprobs_BT")
    changes = {name: torch.where(batch.mask_BT, getattr(batch, name), poison) for name in names}
    poisoned = advantages(dataclasses.replace(batch, **changes), config).advantages_BT
    assert torch.equal(poisoned, clean) and clean[~batch.mask_BT].eq(0).all()


# --- the update ---
@pytest.mark.parametrize("kind", CRITIC_FREE)
def test_without_a_critic_the_value_head_gets_no_gradient_and_the_policy_does(kind: str) -> None:
    policy, config = BigramPolicy(), config_of(advantage=kind, vf_coef=10.0)
    logits, values = policy.weights()
    result = train(policy, advantages(grouped_batch(policy, drift=0.3), config), config)
    assert result.steps == 2
    assert policy.values_V.grad is None and torch.equal(policy.weights()[1], values)
    assert not torch.equal(policy.weights()[0], logits)
    assert float(result.stats.value_loss) == 0.0


@pytest.mark.parametrize("kind", ["gae", "grpo"])
def test_of_a_critic_something_is_logged_only_where_there_is_one(kind: str) -> None:
    policy, objective = BigramPolicy(), PPOObjective(config_of(advantage=kind))
    batch = objective.prepare(grouped_batch(policy))
    logged = objective.metrics(batch, train(policy, batch, objective.config))
    names = [name for name in logged if name.startswith("critic/")]
    assert len(names) == 5 if kind == "gae" else names == []


# --- aggregation, clips, KL in the loss, sampler weights: the gradient of a minibatch ---

EVERYTHING = {"clip_range_high": 0.3, "dual_clip": 1.3, "kl": {"placement": "loss", "coef": 0.2}, "tis_cap": 1.1}
AGGREGATIONS = ("token", "sequence", "constant")
ROWS = torch.tensor([0, 2, 3, 5, 6, 7])  # a minibatch of six of the eight


def gradients_with(
    config: Config, *, tokens: int = 1_000, columns: int = 0, poison: float = 0.0, rows: Tensor = ROWS
) -> list[Tensor]:
    """Gradients of the rows' loss by logits and values, with a reference, and a sampler that is a little off."""
    policy, objective = BigramPolicy(reference=reference_table(), off_mask=poison), PPOObjective(config)
    batch = objective.prepare(padded(sampled_batch(policy), columns, poison=poison))
    return gradient_of(objective, policy, batch, rows=rows, tokens=tokens)[0]


def sampled_batch(policy: BigramPolicy) -> Batch:
    batch = grouped_batch(BigramPolicy(), drift=0.3)
    batch.reference_logprobs_BT = policy.reference_logprobs(batch)
    noise = torch.randn(batch.logprobs_BT.shape, generator=torch.Generator().manual_seed(7))
    batch.behavior_logprobs_BT = batch.logprobs_BT + 0.2 * noise
    batch.step_limit = 6
    return batch


def test_how_far_the_sampler_was_off_is_measured_by_hand() -> None:
    batch = grouped_batch(BigramPolicy(), drift=0.3)
    assert not any(name.startswith("sampler/") for name in batch_metrics(batch))
    off_BT = torch.full(batch.mask_BT.shape, 5.0)  # off the mask nobody looks
    off_BT[batch.mask_BT] = 0.1
    row, t = batch.mask_BT.nonzero()[0].tolist()
    off_BT[row, t] = -0.4
    batch.behavior_logprobs_BT = batch.logprobs_BT + off_BT
    metrics, tokens = batch_metrics(batch), int(batch.mask_BT.sum())
    found = [metrics["sampler/mismatch_mean"], metrics["sampler/mismatch_max"]]
    assert found == pytest.approx([(0.4 + 0.1 * (tokens - 1)) / tokens, 0.4], abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_equals_a_token_by_token_twin(aggregation: str) -> None:
    """Every answer's tokens one after the other in plain Python; autograd only through the policy's tables."""
    config = config_of(advantage="dr_grpo", loss_aggregation=aggregation, **EVERYTHING)
    policy = BigramPolicy()
    batch = advantages(sampled_batch(BigramPolicy(reference=reference_table())), config)
    total, tokens = torch.zeros(()), 0
    for row in ROWS.tolist():
        answer, places = torch.zeros(()), batch.mask_BT[row].nonzero().flatten().tolist()
        for t in places:
            before, action = int(batch.observations["tokens"][row, t - 1]), int(batch.actions_BT[row, t])
            logprob, old = torch.log_softmax(policy.logits_VV[before], dim=0)[action], batch.logprobs_BT[row, t]
            ratio = torch.exp(logprob - old)
            advantage = float(batch.advantages_BT[row, t]) * min(math.exp(old - batch.behavior_logprobs_BT[row, t]), 1.1)
            objective = min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
            objective = max(objective, torch.tensor(1.3 * advantage)) if advantage < 0 else objective
            off = logprob - batch.reference_logprobs_BT[row, t]
            answer = answer - objective + 0.2 * ratio.detach() * off**2 / 2
        tokens += len(places)
        total = total + (answer / len(places) if aggregation == "sequence" else answer)
    denominator = {"token": tokens, "sequence": len(ROWS), "constant": 6 * len(ROWS)}[aggregation]
    (total / denominator).backward()
    (gradient,) = gradients_with(config)
    torch.testing.assert_close(gradient, policy.logits_VV.grad, rtol=0, atol=1e-6)


GSPO, CISPO = {"importance_sampling_level": "sequence"}, {"policy_loss": "cispo", "dual_clip": None}
OTHERS = [(kind, "sequence", loss) for kind in ("gae", "grpo") for loss in (GSPO, CISPO)] + [("gae", "token", GSPO | CISPO)]


@pytest.mark.parametrize(
    ("kind", "aggregation", "loss"), [*((kind, of, {}) for kind in ("gae", "grpo") for of in AGGREGATIONS), *OTHERS]
)
def test_micro_batches_padding_and_order_do_not_change_the_gradient(kind: str, aggregation: str, loss: Any) -> None:
    config = config_of(advantage=kind, loss_aggregation=aggregation, ent_coef=0.01, **EVERYTHING | loss)
    whole = gradients_with(config)
    assert len(whole) == (2 if kind == "gae" else 1)
    for tokens, columns, poison in ((1, 0, 0.0), (14, 0, 0.0), (14, 3, math.nan), (20, 20, 1e9)):
        for rows in (ROWS, ROWS.flip(0)):
            found = gradients_with(config, tokens=tokens, columns=columns, poison=poison, rows=rows)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_with_the_kl_in_the_loss_the_reward_is_not_penalized() -> None:
    batch = sampled_batch(BigramPolicy(reference=reference_table()))
    in_loss = advantages(batch, config_of(kl={"placement": "loss", "coef": 0.5})).advantages_BT
    assert torch.equal(in_loss, advantages(batch, config_of(kl={"coef": 0.0})).advantages_BT)
    assert not torch.equal(in_loss, advantages(batch, config_of(kl={"coef": 0.5})).advantages_BT)


# --- groups, and completions that were cut off ---


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_truncated_completions_are_left_out_of_the_loss_alone(aggregation: str) -> None:
    """With advantages of the whole group, and of a mean over completions the denominator too; NaN in them reaches nothing."""
    policy, config = BigramPolicy(), config_of(advantage="grpo", loss_aggregation=aggregation, group={"size": 4})
    batch = advantages(grouped_batch(policy, drift=0.3), config)
    batch.truncated_B, batch.step_limit = torch.arange(8) % 3 == 0, 6  # rows 0, 3, 6
    rest = batch.rows(torch.tensor([1, 2, 4, 5, 7]))
    (expected,), kept = gradient_of(PPOObjective(config), policy, rest)
    objective = PPOObjective(fakes.config_of(config, mask_truncated=True))
    batch.logprobs_BT = torch.where(batch.truncated_B[:, None], math.nan, batch.logprobs_BT)
    (found,), stats = gradient_of(objective, policy, objective.select(batch, 8))
    torch.testing.assert_close(found, expected * (1.0 if aggregation == "token" else 5 / 8), rtol=0, atol=1e-7)
    assert float(stats.num_tokens) == float(kept.num_tokens) == float(rest.mask_BT.sum())
    assert objective.metrics(batch, UpdateResult(stats))["ppo/masked_completions"] == 3
    batch.truncated_B = torch.ones(8, dtype=torch.bool)
    before, result = policy.weights(), train(policy, batch, objective.config)
    assert (result.steps, result.stats) == (0, None) and torch.equal(policy.weights()[0], before[0])


def test_a_minibatch_of_truncated_completions_alone_is_survived() -> None:
    policy, config = tiny_policy(), config_of(advantage="rloo", mask_truncated=True, batch_size=2, micro_batch_tokens=8)
    batch = written_batch([(random_tokens(3, seed=row), random_tokens(4, seed=10 + row)) for row in range(4)])
    with torch.no_grad():
        batch.logprobs_BT = policy.evaluate(batch).logprobs_BT
    batch.advantages_BT, batch.truncated_B = torch.ones(batch.mask_BT.shape), torch.tensor([True, True, True, False])
    result = update(policy, batch, PPOObjective(config), check_first=True)
    assert result.steps == 4 and float(result.stats.num_tokens) == 2 * 4 and result.skipped == 0


def test_zero_variance_groups_are_left_out() -> None:
    """The update is that of the batch without them: they would only have made the mean over tokens smaller."""
    weights = []
    for skip in (True, False):
        policy = BigramPolicy()
        batch = grouped_batch(policy)
        batch.rewards_BT[4:] = torch.where(batch.ends_BT[4:], 0.7, 0.0)
        config = config_of(advantage="grpo", group={"size": 4, "skip_zero_variance": skip})
        batch = advantages(batch, config)
        assert batch.advantages_BT[4:].eq(0).all()
        result = train(policy, batch if skip else batch.rows(torch.arange(4)), config)
        assert float(result.first.num_tokens) == sum(RAGGED[:4])
        weights.append(policy.weights()[0])
    assert torch.equal(*weights)


def test_groups_with_equal_rewards_are_counted() -> None:
    batch = scored([1.0, 1.0, 0.0, 1.0, 2.0, 2.0], [1, 2, 1, 1, 3, 1])
    batch.groups_B = torch.tensor([0, 0, 1, 1, 2, 2])
    batch.rewards_BT = torch.where(batch.mask_BT, batch.rewards_BT, math.nan)
    assert has_reward_variance(batch).tolist() == [False, False, True, True, False, False]
    assert batch_metrics(batch)["reward/zero_variance_groups"] == 2.0
    batch.groups_B = torch.arange(6)
    assert "reward/zero_variance_groups" not in batch_metrics(batch)


# --- the critic ---
def test_while_the_critic_warms_up_the_policy_stays_and_its_optimizer_knows_nothing() -> None:
    policy, config = BigramPolicy(), config_of(group={"size": 1}, critic={"warmup_updates": 2}, ent_coef=0.1)
    optimizer = make_optimizer(policy)
    for version in range(3):
        logits, values = policy.weights()
        batch = dataclasses.replace(played_batch(policy, RAGGED, seed=version), version=version)
        train(policy, advantages(batch, config), config, optimizer=optimizer)
        assert torch.equal(policy.weights()[0], logits) == (version < 2)
        assert (policy.logits_VV in optimizer.state) == (version == 2)
        assert not torch.equal(policy.weights()[1], values)


def test_the_critic_may_look_further_ahead_than_the_policy() -> None:
    """λ 1 for the returns, λ 0 for the advantages, and the other way round; γ 1, values 0.5, reward 1 at the end."""
    batch = scored([1.0], [3])
    batch.values_BT = torch.full_like(batch.values_BT, 0.5)
    near, far = [[0, 0.5, 0.5, 1]], [[0, 1, 1, 1]]
    for lam, critic, expected, returns in ((0.0, 1.0, [0, 0, 0, 0.5], far), (1.0, 0.0, [0, 0.5, 0.5, 0.5], near)):
        advantages(batch, config_of(gae_lambda=lam, critic={"gae_lambda": critic}))
        assert batch.advantages_BT.tolist() == [expected] and batch.returns_BT.tolist() == returns
    assert advantages(batch, config_of(gae_lambda=0.0)).returns_BT.tolist() == near

"""From a batch to better weights: what the gradient may depend on, and when a step must not be taken."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import Config
from surefoot.core.losses import LossStats
from surefoot.data.batches import micro_batches
from surefoot.rollout.batch import text_batch
from surefoot.train.update import TokenBudget, UpdateResult, accumulate_gradient, advantages, make_optimizer, update
from surefoot.types import Batch
from tests.fakes import CPU, VOCABULARY, BigramPolicy, config_of, padded, played_batch, trajectory

RAGGED = (9, 1, 4, 12, 2, 7, 3, 12)  # written tokens a row
ROWS = torch.arange(len(RAGGED))
CONFIG = config_of(batch_size=8, episodes_per_update=8, n_epochs=1, vf_coef=0.3, ent_coef=0.01, clip_range_vf=0.2)


def off_policy_batch(policy: BigramPolicy, config: Config = CONFIG, *, seed: int = 0) -> Batch:
    """Eight ragged rows whose old policy is a little away, so that every branch of the loss has its steps."""
    return advantages(played_batch(policy, RAGGED, seed=seed, drift=0.3), config)


def gradients_with(policy: BigramPolicy, batch: Batch, budget: TokenBudget) -> tuple[list[Tensor], LossStats]:
    """Gradient and statistics of one minibatch of all rows."""
    policy.seen.clear()
    optimizer = make_optimizer(policy, CONFIG)
    stats = accumulate_gradient(policy, batch, ROWS, config=CONFIG, optimizer=optimizer, budget=budget)
    return policy.gradients(), stats


def budget_for(batch: Batch, count: int) -> int:
    """The token budget that splits the batch into `count` micro-batches."""
    budgets = range(1, batch.mask_BT.numel() + 1)
    return next(tokens for tokens in budgets if len(micro_batches(batch, ROWS, tokens)) == count)


def assert_near(values: list[Tensor], expected: list[Tensor], atol: float = 1e-6) -> None:
    assert len(values) == len(expected) > 0
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=atol)


def assert_equal(values: list[Tensor], expected: list[Tensor]) -> None:
    assert len(values) == len(expected) and all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def snapshot(policy: BigramPolicy, optimizer: torch.optim.Adam) -> list[Tensor]:
    """Every tensor that a step changes: weights, both moments, step counts."""
    moments = [copy.deepcopy(value) for state in optimizer.state.values() for value in state.values()]
    return policy.weights() + moments


# --- the first minibatch ---


def test_first_minibatch_has_ratio_one() -> None:
    policy = BigramPolicy()
    config = config_of(batch_size=4, episodes_per_update=8, n_epochs=3)
    batch = advantages(played_batch(policy, RAGGED), config)
    first = update(policy, batch, config=config).first
    steps = int(first.steps)
    assert steps > 0
    assert float(first.ratio) == steps and float(first.ratio_max) == 1.0
    assert float(first.approx_kl) == 0.0
    assert float(first.clipped) == 0.0 and float(first.value_clipped) == 0.0
    assert float(first.policy_loss / steps) == pytest.approx(0.0, abs=1e-6)  # whitened advantages have mean 0


def test_later_minibatches_have_another_ratio() -> None:
    """Or else the first one would prove nothing."""
    policy = BigramPolicy()
    config = config_of(batch_size=4, episodes_per_update=8, n_epochs=3, learning_rate=0.1)
    result = update(policy, advantages(played_batch(policy, RAGGED), config), config=config)
    assert result.steps == 6
    assert float(result.stats.approx_kl) > 0 and float(result.stats.ratio_max) > 1.01


def test_first_minibatch_is_shown_before_any_step_and_once() -> None:
    policy = BigramPolicy()
    config = config_of(batch_size=4, episodes_per_update=8, n_epochs=2)
    weights, seen = policy.weights(), []

    def look(stats: LossStats) -> None:
        assert_equal(policy.weights(), weights)
        seen.append(stats)

    result = update(policy, advantages(played_batch(policy, RAGGED), config), config=config, before_first_step=look)
    assert seen == [result.first]
    assert result.steps == 4


def test_minibatches_cover_every_row_once_an_epoch_and_differ_between_epochs() -> None:
    policy = BigramPolicy()
    config = config_of(batch_size=2, episodes_per_update=8, n_epochs=2)
    batch, order = advantages(played_batch(policy, RAGGED), config), []
    policy.before_evaluate = lambda part: order.extend(part.mask_BT.sum(1).tolist())
    result = update(policy, batch, config=config, generator=torch.Generator().manual_seed(3))
    assert sorted(order[:8]) == sorted(order[8:]) == sorted(RAGGED)
    assert order[:8] != order[8:]
    assert float(result.stats.steps) == 2 * sum(RAGGED)


# --- the gradient belongs to the minibatch alone ---


def test_gradient_equals_a_token_by_token_twin() -> None:
    """The formulas, one token after the other in plain Python, autograd only through the policy's tables."""
    policy = BigramPolicy()
    batch = off_policy_batch(policy)
    gradients, _ = gradients_with(policy, batch, TokenBudget(1_000))
    written = [(b, t) for b, row in enumerate(batch.mask_BT.tolist()) for t, on in enumerate(row) if on]
    raw = [float(batch.advantages_BT[place]) for place in written]
    mean = sum(raw) / len(raw)
    spread = math.sqrt(sum((a - mean) ** 2 for a in raw) / len(raw) + 1e-8)
    loss = torch.zeros(())
    for (b, t), advantage in zip(written, raw, strict=True):
        before, action = int(batch.observations["tokens"][b, t - 1]), int(batch.actions_BT[b, t])
        logprobs = torch.log_softmax(policy.logits_VV[before], dim=0)
        whitened = (advantage - mean) / spread
        ratio = torch.exp(logprobs[action] - batch.logprobs_BT[b, t])
        surrogate = torch.minimum(ratio * whitened, ratio.clamp(0.8, 1.2) * whitened)
        value, old_value, target = policy.values_V[before], batch.values_BT[b, t], batch.returns_BT[b, t]
        near = old_value + (value - old_value).clamp(-0.2, 0.2)
        value_error = torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
        entropy = -(logprobs.exp() * logprobs).sum()
        loss = loss - surrogate + CONFIG.ppo.vf_coef * value_error - CONFIG.ppo.ent_coef * entropy
    expected = torch.autograd.grad(loss / len(written), [policy.logits_VV, policy.values_V])
    assert_near(gradients, list(expected))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_do_not_change_the_gradient(count: int) -> None:
    policy = BigramPolicy()
    batch = off_policy_batch(policy)
    whole, whole_stats = gradients_with(policy, batch, TokenBudget(budget_for(batch, 1)))
    assert len(policy.seen) == 1
    parts, stats = gradients_with(policy, batch, TokenBudget(budget_for(batch, count)))
    assert len(policy.seen) == count
    assert_near(parts, whole)
    for name, value in dataclasses.asdict(whole_stats).items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=1e-5, atol=1e-5)


def test_running_out_of_memory_does_not_change_the_gradient() -> None:
    """The first micro-batch of a try may have left its gradient before a later one fails: it must not count twice."""
    policy = BigramPolicy()
    batch = off_policy_batch(policy)
    whole, whole_stats = gradients_with(policy, batch, TokenBudget(1_000))

    def refuse_big(part: Batch) -> None:
        if part.mask_BT.numel() > 40:
            raise torch.OutOfMemoryError("too big")

    def refuse_third(part: Batch) -> None:
        if len(policy.seen) == 3:
            raise torch.OutOfMemoryError("no room left")

    for refuse, tokens in ((refuse_big, 1_000), (refuse_third, 32)):
        policy.before_evaluate = refuse
        budget = TokenBudget(tokens)
        gradients, stats = gradients_with(policy, batch, budget)
        assert budget.tokens < tokens and len(policy.seen) > 3
        assert_near(gradients, whole)
        assert int(stats.steps) == int(whole_stats.steps)


def test_memory_that_does_not_hold_one_row_is_an_error() -> None:
    policy = BigramPolicy()
    batch = off_policy_batch(policy)

    def refuse(part: Batch) -> None:
        raise torch.OutOfMemoryError("too big")

    policy.before_evaluate = refuse
    with pytest.raises(torch.OutOfMemoryError, match="too big"):
        gradients_with(policy, batch, TokenBudget(1_000))


@pytest.mark.parametrize("poison", [math.nan, 1e9])
def test_padding_changes_neither_gradient_nor_statistics(poison: float) -> None:
    reference = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))
    config = config_of(CONFIG, **{"shaping": {"whiten": True}})
    results = []
    for columns, off_mask in ((0, 0.0), (3, poison), (20, poison)):
        policy = BigramPolicy(reference=reference, off_mask=off_mask)
        batch = played_batch(BigramPolicy(), RAGGED, drift=0.3)
        batch.reference_logprobs_BT = policy.reference_logprobs(batch)
        batch = advantages(padded(batch, columns, poison=poison), config)
        results.append(gradients_with(policy, batch, TokenBudget(48)))
    for gradients, stats in results[1:]:
        assert_near(gradients, results[0][0])
        for name, value in dataclasses.asdict(results[0][1]).items():
            torch.testing.assert_close(getattr(stats, name), value, rtol=1e-6, atol=1e-6)


def test_rows_without_actions_count_for_nothing() -> None:
    policy = BigramPolicy()
    batch = played_batch(policy, RAGGED, drift=0.3)
    optimizer = make_optimizer(policy, CONFIG)

    def gradient_of(rows: Tensor) -> tuple[list[Tensor], LossStats]:
        budget = TokenBudget(48)
        stats = accumulate_gradient(policy, advantages(batch, CONFIG), rows, config=CONFIG, optimizer=optimizer, budget=budget)
        return policy.gradients(), stats

    without, without_stats = gradient_of(ROWS[:6])
    batch.mask_BT[6:] = False  # the last two rows wrote nothing
    batch.rewards_BT[6:] = 1e6
    gradients, stats = gradient_of(ROWS)
    assert_near(gradients, without)
    assert int(stats.steps) == int(without_stats.steps) == sum(RAGGED[:6])
    torch.testing.assert_close(stats.policy_loss, without_stats.policy_loss)


@pytest.mark.parametrize("reward", [0.0, 1.0, -7.3])
def test_minibatch_of_one_token_is_finite(reward: float) -> None:
    policy = BigramPolicy()
    config = config_of(batch_size=1, episodes_per_update=1, n_epochs=2, shaping={"whiten": True})
    batch = played_batch(policy, [1])
    batch.rewards_BT = torch.where(batch.ends_BT, reward, 0.0)
    result = update(policy, advantages(batch, config), config=config)
    assert (result.steps, result.skipped) == (2, 0)
    assert all(weight.isfinite().all() for weight in policy.weights())


def test_equal_rewards_are_finite() -> None:
    policy = BigramPolicy()
    config = config_of(batch_size=8, episodes_per_update=8, shaping={"whiten": True})
    batch = played_batch(policy, [1] * 8)
    batch.values_BT, batch.rewards_BT = torch.zeros_like(batch.values_BT), torch.where(batch.ends_BT, 0.3, 0.0)
    result = update(policy, advantages(batch, config), config=config)
    assert result.skipped == 0
    assert all(weight.isfinite().all() for weight in policy.weights())


# --- rewards, KL penalty, advantages ---


def scored_batch(lengths: tuple[int, ...], scores: Tensor, logprobs: Tensor, references: Tensor, columns: int) -> Batch:
    """Answers of `lengths` with these scores on their last token, `columns` more of padding, NaN where nothing is."""
    rows = [trajectory(prompt_tokens=[1] * (1 + i % 3), tokens=[2] * n) for i, n in enumerate(lengths)]
    batch = text_batch(rows, device=CPU)
    width = batch.mask_BT.shape[1]
    batch.rewards_BT = torch.where(batch.ends_BT, scores[:, None], batch.rewards_BT)
    batch.logprobs_BT, batch.reference_logprobs_BT = logprobs[:, :width], references[:, :width]
    return padded(batch, columns, poison=math.nan)


@pytest.mark.parametrize("columns", [0, 1, 5])
def test_score_and_kl_are_each_charged_once(columns: int) -> None:
    """With a zero critic and γ = λ = 1 the first token's return is the whole reward: score - β Σ kl, in every row."""
    lengths, beta = (1, 5, 2, 5, 1, 3), 0.3  # rows 3 and 5 reach the right edge, rows 0 and 4 have one token
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=generator)
    logprobs, references = -torch.rand(6, 8, generator=generator), -torch.rand(6, 8, generator=generator)
    batch = scored_batch(lengths, scores, logprobs, references, columns)
    kl = torch.where(batch.mask_BT, batch.logprobs_BT - batch.reference_logprobs_BT, 0.0).sum(1)
    batch.values_BT = torch.where(batch.mask_BT, 0.0, math.nan)
    advantages(batch, config_of(kl={"coef": beta}, gamma=1.0, gae_lambda=1.0))
    first = [1 + i % 3 for i in range(6)]
    torch.testing.assert_close(batch.returns_BT[torch.arange(6), first], scores - beta * kl)
    # λ = 0 and γ = 0 leave each token its own reward: the score is the last written one's, not a padding's.
    advantages(batch, config_of(kl={"coef": 0.0}, gamma=0.0, gae_lambda=0.0))
    last = [start + n - 1 for start, n in zip(first, lengths, strict=True)]
    torch.testing.assert_close(batch.returns_BT[torch.arange(6), last], scores)
    torch.testing.assert_close(batch.returns_BT.sum(1), scores)


def test_unlikelier_under_the_reference_is_penalised() -> None:
    """A flipped sign would reward drifting away: fluent, maximally wrong text."""
    policy = BigramPolicy()
    batch = played_batch(policy, [1, 1])
    batch.rewards_BT, batch.values_BT = torch.zeros_like(batch.rewards_BT), torch.zeros_like(batch.values_BT)
    batch.reference_logprobs_BT = batch.logprobs_BT + torch.tensor([[-1.0], [1.0]])
    advantages(batch, config_of(kl={"coef": 0.5}))
    assert batch.advantages_BT.sum(1).tolist() == pytest.approx([-0.5, 0.5])


def test_rewards_are_whitened_after_the_kl_penalty_and_keep_their_mean() -> None:
    policy = BigramPolicy()
    batch = played_batch(policy, [1, 1])
    batch.values_BT = torch.zeros_like(batch.values_BT)
    batch.rewards_BT = torch.where(batch.ends_BT, torch.tensor([[2.0], [5.0]]), 0.0)
    batch.reference_logprobs_BT = batch.logprobs_BT + torch.tensor([[0.0], [2.0]])
    advantages(batch, config_of(kl={"coef": 0.5}, shaping={"whiten": True}))
    assert batch.returns_BT.sum(1).tolist() == pytest.approx([3.0, 5.0])  # of 2 and 6: mean 4, spread 2


@pytest.mark.parametrize("normalized", [True, False])
def test_scale_of_the_advantages_matters_only_if_they_are_not_normalised(normalized: bool) -> None:
    settings = {"normalize_advantage": normalized, "vf_coef": 0.0, "ent_coef": 0.0}
    config, policy = config_of(CONFIG, **settings), BigramPolicy()
    batch, gradients = off_policy_batch(policy, config), []
    for scale in (1.0, 10.0):
        batch.advantages_BT = batch.advantages_BT * scale
        optimizer = make_optimizer(policy, config)
        accumulate_gradient(policy, batch, ROWS, config=config, optimizer=optimizer, budget=TokenBudget(1_000))
        gradients.append(policy.gradients()[0])
    torch.testing.assert_close(gradients[1], gradients[0] * (1.0 if normalized else 10.0), rtol=0, atol=1e-5)


def test_update_makes_the_rewarded_answer_likelier() -> None:
    policy = BigramPolicy()
    rows = [trajectory(prompt_tokens=[1], tokens=[token]) for token in (2, 3, 4, 5)]
    batch = text_batch(rows, device=CPU)
    batch.logprobs_BT = policy.evaluate(batch).logprobs_BT.detach()
    batch.rewards_BT = torch.where(batch.ends_BT, torch.tensor([[1.0], [0.0], [0.0], [0.0]]), 0.0)
    before = policy.logits_VV[1].detach().softmax(0)
    config = config_of(batch_size=4, episodes_per_update=4, n_epochs=4, learning_rate=0.01)
    update(policy, advantages(batch, config), config=config)
    after = policy.logits_VV[1].detach().softmax(0)
    assert after[2] > before[2]
    assert all(after[token] < before[token] for token in (3, 4, 5))


# --- when to stop, and when not to step ---


def test_target_kl_stops_before_the_step() -> None:
    def trained(**settings: Any) -> tuple[list[Tensor], UpdateResult]:
        policy = BigramPolicy()
        config = config_of(batch_size=8, episodes_per_update=8, learning_rate=0.1, **settings)
        result = update(policy, advantages(played_batch(policy, RAGGED), config), config=config)
        return policy.weights(), result

    once, _ = trained(n_epochs=1)
    weights, result = trained(n_epochs=5, target_kl=1e-4)
    assert (result.steps, result.stopped_early) == (1, True)  # KL is 0 before the first step, too much before the second
    assert_equal(weights, once)
    assert trained(n_epochs=5, target_kl=1e4)[1].stopped_early is False
    assert trained(n_epochs=5, target_kl=1e4)[1].steps == 5


def test_target_kl_holds_for_the_very_first_step() -> None:
    policy = BigramPolicy()
    config = config_of(CONFIG, **{"target_kl": 1e-4})
    batch, weights = off_policy_batch(policy, config), policy.weights()
    result = update(policy, batch, config=config)
    assert (result.steps, result.stopped_early) == (0, True)
    assert_equal(policy.weights(), weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "gradient of the logits", "gradient of the values", "old log-probs", "returns"])
def test_non_finite_numbers_change_no_weight_and_no_optimiser_state(bad: float, where: str) -> None:
    policy = BigramPolicy()
    optimizer = make_optimizer(policy, CONFIG)
    assert update(policy, off_policy_batch(policy), config=CONFIG, optimizer=optimizer).steps == 1
    batch = off_policy_batch(policy, seed=1)
    before = snapshot(policy, optimizer)
    assert len(before) == 2 + 2 * 3  # two tables; two moments and a step count for each

    place = torch.zeros(VOCABULARY, VOCABULARY)
    place[2, 3] = bad
    if where == "logits":
        policy.on_logits = lambda logits: logits + torch.where(torch.arange(VOCABULARY) == 3, bad, 0.0)
    elif where == "gradient of the logits":
        policy.logits_VV.register_hook(lambda gradient: gradient + place)
    elif where == "gradient of the values":
        policy.values_V.register_hook(lambda gradient: gradient + place[2])
    elif where == "old log-probs":
        batch.logprobs_BT = torch.where(batch.ends_BT, math.nan, batch.logprobs_BT)  # ±inf is only a clamped ratio
    else:
        batch.returns_BT = torch.where(batch.ends_BT, bad, batch.returns_BT)

    result = update(policy, batch, config=CONFIG, optimizer=optimizer)
    assert (result.steps, result.skipped, result.skipped_in_a_row) == (0, 1, 1)
    assert_equal(snapshot(policy, optimizer), before)
    assert policy.gradients() == []  # nothing is left to leak into the next step


def trained_with_faults(bad_calls: set[int], **settings: Any) -> tuple[BigramPolicy, UpdateResult]:
    """An update in which the policy's logits are NaN in these evaluations (1, 2, …)."""
    policy = BigramPolicy()
    config = config_of(episodes_per_update=8, **settings)
    batch = advantages(played_batch(policy, RAGGED), config)
    policy.on_logits = lambda logits: logits * (math.nan if len(policy.seen) in bad_calls else 1.0)
    return policy, update(policy, batch, config=config)


@pytest.mark.parametrize(("bad_calls", "in_a_row"), [({1, 2, 3}, 0), ({2, 7, 8}, 2)])
def test_skipped_steps_in_a_row_are_counted_and_a_good_step_ends_the_row(bad_calls: set[int], in_a_row: int) -> None:
    policy, result = trained_with_faults(bad_calls, batch_size=1, n_epochs=1)
    assert (result.steps, result.skipped, result.skipped_in_a_row) == (5, 3, in_a_row)
    assert all(weight.isfinite().all() for weight in policy.weights())
    assert math.isfinite(result.grad_norm)


def test_a_skipped_step_leaves_no_trace_in_the_steps_after_it() -> None:
    faulty, _ = trained_with_faults({1, 3}, batch_size=8, n_epochs=5)
    plain, _ = trained_with_faults(set(), batch_size=8, n_epochs=3)
    assert_equal(faulty.weights(), plain.weights())


@pytest.mark.parametrize(
    ("field", "extreme"),
    [("logprobs_BT", -1e4), ("logprobs_BT", 0.0), ("rewards_BT", 1e6), ("rewards_BT", -1e6), ("values_BT", 1e6)],
)
def test_extreme_values_are_survived(field: str, extreme: float) -> None:
    policy = BigramPolicy()
    batch = played_batch(policy, RAGGED)
    setattr(batch, field, torch.where(batch.ends_BT, extreme, getattr(batch, field)))
    config = config_of(batch_size=4, episodes_per_update=8, n_epochs=2)
    result = update(policy, advantages(batch, config), config=config)
    assert (result.steps, result.skipped) == (4, 0)
    assert all(weight.isfinite().all() for weight in policy.weights())
    assert result.stats.sums.isfinite().all() and result.stats.ratio_max.isfinite()


# --- the optimiser ---


def gradient_norm(gradients: list[Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def adam_by_hand(
    gradient: Callable[[list[Tensor]], list[Tensor]],
    weights: list[Tensor],
    *,
    steps: int,
    rate: float,
    epsilon: float,
) -> list[Tensor]:
    """Kingma & Ba 2015, Algorithm 1."""
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t in range(1, steps + 1):
        for i, g in enumerate(gradient(weights)):
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.999 * squares[i] + 0.001 * g**2
            step = rate * (means[i] / (1 - 0.9**t)) / ((squares[i] / (1 - 0.999**t)).sqrt() + epsilon)
            weights[i] = weights[i] - step
    return weights


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_adam_follows_its_formula(steps: int) -> None:
    config = config_of(
        batch_size=8, episodes_per_update=8, n_epochs=steps, learning_rate=0.01, adam_epsilon=1e-3,
        max_grad_norm=1e6,
    )  # fmt: skip
    policy, other = BigramPolicy(), BigramPolicy()
    batch = off_policy_batch(policy, config)

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            other.logits_VV.copy_(weights[0])
            other.values_V.copy_(weights[1])
        optimizer = make_optimizer(other, config)
        accumulate_gradient(other, batch, ROWS, config=config, optimizer=optimizer, budget=TokenBudget(1_000))
        return other.gradients()

    by_hand = adam_by_hand(gradient, policy.weights(), steps=steps, rate=0.01, epsilon=1e-3)
    assert update(policy, batch, config=config).steps == steps
    assert_near(policy.weights(), by_hand, atol=1e-6)


def test_gradient_is_clipped_by_its_global_norm() -> None:
    """Seen through an epsilon so large that Adam's first step is the gradient itself, scaled."""
    settings = {"adam_epsilon": 1e6, "learning_rate": 1e6, "max_grad_norm": 0.01}
    config = config_of(CONFIG, **settings)
    policy = BigramPolicy()
    batch, before = off_policy_batch(policy, config), policy.weights()
    gradients, _ = gradients_with(policy, batch, TokenBudget(1_000))
    result = update(policy, batch, config=config)
    norm = gradient_norm(gradients)
    assert norm > 0.01
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # reported as it was before clipping
    expected = [w - g * 0.01 / norm for w, g in zip(before, gradients, strict=True)]
    assert_near(policy.weights(), expected)


def test_learning_rate_given_by_the_schedule_takes_the_place_of_the_configured_one() -> None:
    def moved(rate: float | None) -> float:
        policy = BigramPolicy()
        batch, before = off_policy_batch(policy), policy.weights()
        optimizer = make_optimizer(policy, CONFIG)
        update(policy, batch, config=CONFIG, optimizer=optimizer, learning_rate=rate)
        return float((policy.weights()[0] - before[0]).abs().max())

    assert moved(None) == pytest.approx(CONFIG.ppo.learning_rate, rel=1e-2)
    assert moved(1e-6) == pytest.approx(1e-6, rel=0.2)


def test_the_smallest_learning_rate_still_moves_float32_weights() -> None:
    policy = BigramPolicy()
    batch, before = off_policy_batch(policy), policy.weights()
    update(policy, batch, config=CONFIG, learning_rate=1e-6)
    assert all((after != old).float().mean() > 0.5 for after, old in zip(policy.weights(), before, strict=True))

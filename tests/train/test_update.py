"""From a batch to better weights: what the gradient may depend on, and when a step must not be taken."""

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.config import Config
from surefoot.core.losses import PPOStats
from surefoot.rollout.batch import text_batch
from surefoot.train.ppo_objective import PPOObjective, advantages
from surefoot.train.update import TokenBudget, make_optimizer, update
from surefoot.types import Batch
from tests.fakes import CPU, VOCABULARY, BigramPolicy, config_of, gradient_of, padded, played_batch, train, trajectory

RAGGED = (9, 1, 4, 12, 2, 7, 3, 12)  # completion tokens a row
LOSS = {"batch_size": 8, "n_epochs": 1, "vf_coef": 0.3, "ent_coef": 0.01, "clip_range_vf": 0.2}
CONFIG = config_of(**LOSS)


def off_policy_batch(policy: BigramPolicy, config: Config = CONFIG, *, seed: int = 0) -> Batch:
    """Eight ragged rows whose old policy is a little away, so that every branch of the loss has its steps."""
    return advantages(played_batch(policy, RAGGED, seed=seed, drift=0.3), config)


def gradients_with(policy: BigramPolicy, batch: Batch, tokens: int = 1_000) -> tuple[list[Tensor], PPOStats]:
    """Gradient and sums of one minibatch of all rows, with CONFIG."""
    policy.seen.clear()
    return gradient_of(PPOObjective(CONFIG), policy, batch, tokens=tokens)


def assert_near(values: list[Tensor], expected: list[Tensor], atol: float = 1e-6) -> None:
    assert values
    torch.testing.assert_close(values, expected, rtol=0, atol=atol)


def assert_equal(values: list[Tensor], expected: list[Tensor]) -> None:
    assert_near(values, expected, atol=0)


# --- the first minibatch ---
def test_first_minibatch_has_ratio_one_and_later_ones_another() -> None:
    policy, config = BigramPolicy(), config_of(batch_size=4, n_epochs=3, learning_rate=0.1)
    result = train(policy, advantages(played_batch(policy, RAGGED), config), config, check_first=True)
    first, tokens = result.first, float(result.first.num_tokens)
    assert tokens > 0 and float(first.ratio) == tokens and float(first.ratio_max) == 1.0
    assert float(first.approx_kl) == float(first.clipped) == float(first.value_clipped) == 0.0
    assert float(first.policy_loss) / tokens == pytest.approx(0.0, abs=1e-6)  # whitened advantages have mean 0
    assert result.steps == 6
    assert float(result.stats.approx_kl) > 0 and float(result.stats.ratio_max) > 1.01


def test_minibatches_cover_every_row_once_an_epoch_and_differ_between_epochs() -> None:
    policy, config = BigramPolicy(), config_of(batch_size=3, n_epochs=2)  # 3, 3 and 2 of 8 rows
    batch, order = advantages(played_batch(policy, RAGGED), config), []
    policy.before_evaluate = lambda part: order.extend(part.mask_BT.sum(1).tolist())
    result = train(policy, batch, config, generator=torch.Generator().manual_seed(3))
    assert sorted(order[:8]) == sorted(order[8:]) == sorted(RAGGED)
    assert order[:8] != order[8:]
    assert float(result.stats.num_tokens) == 2 * sum(RAGGED)


# --- the gradient belongs to the minibatch alone ---
def test_gradient_equals_a_token_by_token_twin() -> None:
    """The formulas, one token after the other in plain Python, autograd only through the policy's tables."""
    policy = BigramPolicy()
    batch = off_policy_batch(policy)
    gradients, _ = gradients_with(policy, batch)
    written = [(b, t) for b, row in enumerate(batch.mask_BT.tolist()) for t, on in enumerate(row) if on]
    raw = [float(batch.advantages_BT[place]) for place in written]
    mean, spread = statistics.fmean(raw), math.sqrt(statistics.pvariance(raw) + 1e-8)
    loss = torch.zeros(())
    for (b, t), advantage in zip(written, raw, strict=True):
        before, action = int(batch.observations["tokens"][b, t - 1]), int(batch.actions_BT[b, t])
        logprobs, whitened = torch.log_softmax(policy.logits_VV[before], dim=0), (advantage - mean) / spread
        ratio = torch.exp(logprobs[action] - batch.logprobs_BT[b, t])
        surrogate = torch.minimum(ratio * whitened, ratio.clamp(0.8, 1.2) * whitened)
        value, old_value, target = policy.values_V[before], batch.values_BT[b, t], batch.returns_BT[b, t]
        near = old_value + (value - old_value).clamp(-0.2, 0.2)
        value_error = torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
        entropy = -(logprobs.exp() * logprobs).sum()
        loss = loss - surrogate + 0.3 * value_error - 0.01 * entropy
    expected = torch.autograd.grad(loss / len(written), [policy.logits_VV, policy.values_V])
    assert_near(gradients, list(expected))


@pytest.mark.parametrize(
    ("is_too_big", "tokens"),
    [(lambda policy, part: part.mask_BT.numel() > 40, 1_000), (lambda policy, part: len(policy.seen) == 3, 32)],
    ids=["of its size", "after others"],
)
def test_running_out_of_memory_does_not_change_the_gradient(is_too_big: Any, tokens: int) -> None:
    """The first micro-batch of a try may have left its gradient before a later one fails: it must not count twice."""

    def refuse(part: Batch) -> None:
        if is_too_big(policy, part):
            raise torch.OutOfMemoryError("too big")

    whole, stats = gradients_with(policy := BigramPolicy(), off_policy_batch(policy))
    policy, budget, unclipped = BigramPolicy(), TokenBudget(tokens), config_of(CONFIG, max_grad_norm=1e9)
    batch, policy.before_evaluate = off_policy_batch(policy), refuse
    result = train(policy, batch, unclipped, budget=budget)
    assert budget.tokens < tokens and len(policy.seen) > 3 and int(result.stats.num_tokens) == int(stats.num_tokens)
    assert_near(policy.gradients(), whole)
    is_too_big = lambda policy, part: True  # noqa: E731 - not one row fits
    with pytest.raises(torch.OutOfMemoryError, match="too big"):
        train(policy, batch, unclipped, budget=budget)


def test_rows_without_actions_count_for_nothing() -> None:
    policy = BigramPolicy()
    batch, objective = played_batch(policy, RAGGED, drift=0.3), PPOObjective(CONFIG)
    without, without_stats = gradient_of(objective, policy, objective.prepare(batch), rows=torch.arange(6), tokens=48)
    batch.mask_BT[6:] = False  # the last two rows wrote nothing
    batch.rewards_BT[6:] = 1e6
    gradients, stats = gradient_of(objective, policy, objective.prepare(batch), tokens=48)
    assert_near(gradients, without)
    assert int(stats.num_tokens) == int(without_stats.num_tokens) == sum(RAGGED[:6])
    torch.testing.assert_close(stats.policy_loss, without_stats.policy_loss)


# --- rewards, KL penalty, advantages ---
@pytest.mark.parametrize("columns", [0, 1, 5])
def test_reward_and_kl_are_each_charged_once(columns: int) -> None:
    """With a zero critic and γ = λ = 1 the first token's return is the whole reward: reward - β Σ kl, in every row."""
    lengths, beta = (1, 5, 2, 5, 1, 3), 0.3  # rows 3 and 5 reach the right edge, rows 0 and 4 have one token
    generator = torch.Generator().manual_seed(0)
    rewards, (logprobs, references) = torch.randn(6, generator=generator), -torch.rand(2, 6, 8, generator=generator)
    rows = [trajectory(prompt_tokens=[1] * (1 + i % 3), tokens=[2] * n) for i, n in enumerate(lengths)]
    batch = text_batch(rows, device=CPU)
    batch.rewards_BT = torch.where(batch.ends_BT, rewards[:, None], batch.rewards_BT)
    batch.logprobs_BT, batch.reference_logprobs_BT = (x[:, : batch.mask_BT.shape[1]] for x in (logprobs, references))
    batch = padded(batch, columns, poison=math.nan)
    kl = torch.where(batch.mask_BT, batch.logprobs_BT - batch.reference_logprobs_BT, 0.0).sum(1)
    batch.values_BT = torch.where(batch.mask_BT, 0.0, math.nan)
    advantages(batch, config_of(kl={"coef": beta}, gamma=1.0, gae_lambda=1.0))
    first = [1 + i % 3 for i in range(6)]
    torch.testing.assert_close(batch.returns_BT[torch.arange(6), first], rewards - beta * kl)
    # λ = 0 and γ = 0 leave each token its own reward: the reward is the last written one's, not a padding's.
    advantages(batch, config_of(kl={"coef": 0.0}, gamma=0.0, gae_lambda=0.0))
    last = [start + n - 1 for start, n in zip(first, lengths, strict=True)]
    torch.testing.assert_close(batch.returns_BT[torch.arange(6), last], rewards)
    torch.testing.assert_close(batch.returns_BT.sum(1), rewards)


@pytest.mark.parametrize(
    ("config", "rewards", "offs", "expected"),
    [
        # A flipped sign would reward drifting away: fluent, maximally wrong text.
        (config_of(kl={"coef": 0.5}), [0.0, 0.0], [-1.0, 1.0], [-0.5, 0.5]),
        # Whitened after the penalty, keeping the mean: of 2 and 6 mean 4, spread 2.
        (config_of(kl={"coef": 0.5}, shaping={"whiten": True}), [2.0, 5.0], [0.0, 2.0], [3.0, 5.0]),
    ],
)
def test_what_is_less_likely_under_the_reference_is_penalized(config, rewards, offs, expected):
    batch = played_batch(BigramPolicy(), [1, 1])
    batch.values_BT = torch.zeros_like(batch.values_BT)
    batch.rewards_BT = torch.where(batch.ends_BT, torch.tensor(rewards)[:, None], 0.0)
    batch.reference_logprobs_BT = batch.logprobs_BT + torch.tensor(offs)[:, None]
    assert advantages(batch, config).returns_BT.sum(1).tolist() == pytest.approx(expected)


# --- when to stop, and when not to step ---
def trained(bad_calls: set[int] | None = None, drift: float = 0.0, **ppo: Any) -> tuple[list[Tensor], Any, list[Tensor]]:
    """Weights before, result and weights of an update in which the policy's logits are NaN in these evaluations (1, 2, …)."""
    policy, config = BigramPolicy(), config_of(**{"batch_size": 8, "n_epochs": 1, "learning_rate": 0.1} | ppo)
    batch, before = advantages(played_batch(policy, RAGGED, drift=drift), config), policy.weights()
    policy.on_logits = lambda logits: logits * (math.nan if len(policy.seen) in (bad_calls or ()) else 1.0)
    return before, train(policy, batch, config), policy.weights()


def test_target_kl_stops_before_the_step() -> None:
    start, _, once = trained()
    # KL is 0 before the first step and too much before the second; with a drift before the very first.
    for drift, target, steps, weights in ((0.0, 1e-4, 1, once), (0.0, 1e4, 5, None), (0.3, 1e-4, 0, start)):
        _, result, found = trained(drift=drift, n_epochs=5, target_kl=target)
        assert (result.steps, result.stopped_early) == (steps, steps < 5)
        assert_equal(found, weights or found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "gradient of the logits", "gradient of the values", "old log-probs", "returns"])
def test_non_finite_numbers_change_no_weight_and_no_optimizer_state(bad: float, where: str) -> None:
    policy = BigramPolicy()
    optimizer = make_optimizer(policy)
    assert train(policy, off_policy_batch(policy), CONFIG, optimizer=optimizer).steps == 1
    batch = off_policy_batch(policy, seed=1)

    def everything() -> list[Tensor]:
        """Both moments and the step count of the two tables, and the tables."""
        return policy.weights() + [copy.deepcopy(value) for state in optimizer.state.values() for value in state.values()]

    before, place = everything(), torch.where(torch.arange(VOCABULARY) == 3, bad, 0.0)
    if where == "logits":
        policy.on_logits = lambda logits: logits + place
    elif where.startswith("gradient"):
        {"logits": policy.logits_VV, "values": policy.values_V}[where.rsplit(maxsplit=1)[-1]].register_hook(lambda g: g + place)
    elif where == "old log-probs":
        batch.logprobs_BT = torch.where(batch.ends_BT, math.nan, batch.logprobs_BT)  # ±inf is only a clamped ratio
    else:
        batch.returns_BT = torch.where(batch.ends_BT, bad, batch.returns_BT)
    result = train(policy, batch, CONFIG, optimizer=optimizer)
    assert (result.steps, result.skipped, result.skipped_in_a_row, len(before)) == (0, 1, 1, 8)
    assert_equal(everything(), before)
    assert policy.gradients() == []  # nothing is left to leak into the next step


@pytest.mark.parametrize(("bad_calls", "in_a_row"), [({1, 2, 3}, 0), ({2, 7, 8}, 2)])
def test_skipped_steps_are_counted_and_leave_no_trace_in_the_steps_after_them(bad_calls: set[int], in_a_row: int) -> None:
    _, result, weights = trained(bad_calls, batch_size=1)
    assert (result.steps, result.skipped, result.skipped_in_a_row) == (5, 3, in_a_row)
    assert all(weight.isfinite().all() for weight in weights) and math.isfinite(result.grad_norm)
    assert_equal(trained({1, 3}, n_epochs=5)[2], trained(n_epochs=3)[2])


@pytest.mark.parametrize(
    ("lengths", "field", "extreme"),
    [
        *((RAGGED, field, extreme) for field, extreme in (("logprobs_BT", -1e4), ("logprobs_BT", 0.0), ("values_BT", 1e6))),
        *((RAGGED, "rewards_BT", extreme) for extreme in (1e6, -1e6)),
        *(([1], "rewards_BT", extreme) for extreme in (0.0, 1.0, -7.3)),  # one token, nothing to compare it with
        ([1] * 8, "rewards_BT", 0.3),
    ],
)
def test_extreme_values_and_small_batches_are_survived(lengths: list[int], field: str, extreme: float) -> None:
    policy, config = BigramPolicy(), config_of(batch_size=4, n_epochs=2, shaping={"whiten": True})
    batch = played_batch(policy, lengths)
    batch.values_BT = batch.values_BT * (len(lengths) > 1)
    setattr(batch, field, torch.where(batch.ends_BT, extreme, getattr(batch, field)))
    result = train(policy, advantages(batch, config), config)
    assert (result.steps, result.skipped) == (2 * math.ceil(len(lengths) / 4), 0)
    assert all(weight.isfinite().all() for weight in policy.weights())
    assert all(math.isfinite(float(value)) for value in vars(result.stats).values())


# --- the optimizer ---
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_adam_follows_its_formula(steps: int) -> None:
    config = config_of(CONFIG, n_epochs=steps, learning_rate=0.01, adam_epsilon=1e-3, max_grad_norm=1e6)
    policy, other = BigramPolicy(), BigramPolicy()
    batch = off_policy_batch(policy, config)

    # Kingma & Ba 2015, Algorithm 1.
    weights = policy.weights()
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, steps + 1):
        with torch.no_grad():
            other.logits_VV.copy_(weights[0])
            other.values_V.copy_(weights[1])
        for i, g in enumerate(gradient_of(PPOObjective(config), other, batch)[0]):
            means[i], squares[i] = 0.9 * means[i] + 0.1 * g, 0.999 * squares[i] + 0.001 * g**2
            denominator = (squares[i] / (1 - 0.999**step)).sqrt() + 1e-3
            weights[i] = weights[i] - 0.01 * (means[i] / (1 - 0.9**step)) / denominator
    assert train(policy, batch, config).steps == steps
    assert_near(policy.weights(), weights)


def test_gradient_is_clipped_by_its_global_norm() -> None:
    """Seen through an epsilon so large that Adam's first step is the gradient itself, scaled."""
    policy, config = BigramPolicy(), config_of(CONFIG, adam_epsilon=1e6, learning_rate=1e6, max_grad_norm=0.01)
    batch, before = off_policy_batch(policy, config), policy.weights()
    gradients, _ = gradients_with(policy, batch)
    result = train(policy, batch, config)
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert result.grad_norm == pytest.approx(norm, rel=1e-5) and norm > 0.01  # reported as it was before clipping
    assert_near(policy.weights(), [w - g * 0.01 / norm for w, g in zip(before, gradients, strict=True)])


def test_an_update_needs_no_more_than_a_policy_and_a_batch() -> None:
    policy = BigramPolicy()
    result = update(policy, advantages(played_batch(policy, RAGGED)))
    assert result.steps == 2  # PPO's two epochs of minibatches of 16

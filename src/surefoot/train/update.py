"""From a batch to better weights: advantages, then epochs × minibatches × micro-batches of the PPO loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surefoot.config import Config, PPOConfig
from surefoot.core.advantages import gae, group_advantages
from surefoot.core.kl import kl_penalised_rewards
from surefoot.core.losses import LossSettings, LossStats, nll_loss, ppo_loss, truncated_ratio
from surefoot.core.masked import library_of, whiten
from surefoot.core.preference import preference_stats
from surefoot.data.batches import micro_batches, minibatches
from surefoot.policies.base import Policy
from surefoot.rollout.batch import has_reward_variance
from surefoot.types import Batch, Evaluation

# What the names of a critic's own parameters begin with.
CRITIC_NAMES = ("critic.", "value_head.")


def make_optimizer(
    policy: Policy, config: Config, *, critic_learning_rate: float | None = None
) -> torch.optim.Adam:
    """Adam over everything the policy trains; a critic of its own may have a step size of its own."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in policy.named_parameters_to_train():
        groups[critic_learning_rate is not None and name.startswith(CRITIC_NAMES)].append(parameter)
    optimizer = torch.optim.Adam(
        groups[False], lr=config.ppo.learning_rate, eps=config.ppo.adam_epsilon, fused=True
    )
    if critic_learning_rate is not None:
        optimizer.add_param_group(
            {"params": groups[True], "scale": critic_learning_rate / config.ppo.learning_rate}
        )
    return optimizer


def advantages(batch: Batch, config: Config | None = None) -> Batch:
    """Fill `advantages_BT` and `returns_BT`: KL penalty into the rewards, whitening on request, then GAE.

    Without a critic (docs/family.md) there are no returns, and what an answer is compared with stands in the batch. A batch of
    another objective has neither rewards nor advantages.
    """
    if batch.objective != "policy":
        return batch
    config = config or Config()
    rewards_BT = batch.rewards_BT
    if batch.reference_logprobs_BT is not None and config.kl.placement == "reward":
        coef = config.kl.coef
        rewards_BT = kl_penalised_rewards(
            rewards_BT, batch.logprobs_BT, batch.reference_logprobs_BT, batch.mask_BT, coef=coef
        )
    if config.shaping.whiten:
        rewards_BT = whiten(rewards_BT, batch.mask_BT, shift_mean=False)
    if not config.ppo.has_critic:
        batch.advantages_BT, batch.returns_BT = _advantages_without_critic(batch, rewards_BT, config), None
        return batch
    estimate = functools.partial(
        gae,
        rewards_BT,
        batch.values_BT,
        mask_BT=batch.mask_BT,
        ends_BT=batch.ends_BT,
        bootstrap_BT=batch.bootstrap_BT,
        gamma=config.ppo.gamma,
    )
    batch.advantages_BT, batch.returns_BT = estimate(lam=config.ppo.gae_lambda)
    if config.policy.critic.gae_lambda is not None:
        _, batch.returns_BT = estimate(lam=config.policy.critic.gae_lambda)
    return batch


def _advantages_without_critic(batch: Batch, rewards_BT: Tensor, config: Config) -> Tensor:
    """[B, T], 0 off the mask: reward-to-go, whitened over the batch, or an answer's whole reward against a baseline."""
    mask_BT = batch.mask_BT
    if config.ppo.advantage == "reinforce_pp":
        # GAE with λ = 1 and values of 0 is the discounted sum of the rewards to come.
        zeros_BT = torch.zeros_like(rewards_BT)
        ends = {"mask_BT": mask_BT, "ends_BT": batch.ends_BT, "bootstrap_BT": zeros_BT}
        to_go_BT, _ = gae(rewards_BT, zeros_BT, **ends, gamma=config.ppo.gamma, lam=1.0)
        whitened_BT: Tensor = whiten(to_go_BT, mask_BT)
        return whitened_BT
    scores_B = torch.where(mask_BT, rewards_BT, 0.0).sum(1)
    if config.ppo.advantage == "remax":
        assert batch.baselines_B is not None, "collect the batch with advantage: remax"
        advantages_B = scores_B - batch.baselines_B
    else:
        assert batch.groups_B is not None, "a batch without groups_B has no answers to compare"
        advantages_B = group_advantages(
            scores_B, batch.groups_B, acted_B=mask_BT.any(1), kind=config.ppo.advantage
        )
    return torch.where(mask_BT, advantages_B[:, None], 0.0)


@dataclass
class UpdateResult:
    """What one update did: optimiser steps taken and skipped, and statistics of every minibatch seen."""

    stats: LossStats | None = None
    first: LossStats | None = None  # of the first minibatch of the first epoch, before any step
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    stopped_early: bool = False
    grad_norm: float = 0.0  # mean over the steps taken, before clipping
    has_critic: bool = True

    def add(self, stats: LossStats) -> None:
        """Count one minibatch in, unless its loss is not finite: one NaN would hide all the others."""
        if stats.is_finite:
            self.first = self.first or stats
            self.stats = stats if self.stats is None else self.stats + stats


class TokenBudget:
    """Most tokens in one micro-batch; halves itself when memory runs out. The gradient does not depend on it."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def shrink(self, error: torch.OutOfMemoryError, smallest: int) -> None:
        """Halve the budget, or give `error` back if one row alone does not fit."""
        if self.tokens <= smallest:
            raise error
        self.tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def update(
    policy: Policy,
    batch: Batch,
    *,
    optimizer: torch.optim.Adam | None = None,
    config: Config | None = None,
    learning_rate: float | None = None,
    generator: torch.Generator | None = None,
    budget: TokenBudget | None = None,
    before_first_step: Callable[[LossStats], None] | None = None,
) -> UpdateResult:
    """Improve `policy` on `batch` (with advantages) by `n_epochs` passes of clipped PPO steps.

    Stops before the first step whose minibatch shows KL(old‖new) > `target_kl`. A step whose loss or gradient is not
    finite is skipped and counted; weights and optimiser state stay as they were. `generator` shuffles the minibatches.
    With `group.skip_zero_variance` nothing is done where no group is left.
    `before_first_step` sees the first minibatch's statistics while old and new policy are still one, and may raise.
    A batch of another `objective` has no advantages: its steps are those of the negative log-likelihood of what was
    demonstrated, or of a reward model's loss. With `ptx` the batch's own `demonstrations` are imitated besides: to each
    minibatch's loss comes `coef` times their mean negative log-likelihood, and the sum is one step.
    """
    config = config or Config()
    optimizer = optimizer or make_optimizer(policy, config)
    generator = generator or torch.Generator().manual_seed(0)
    budget = budget or TokenBudget(config.ppo.micro_batch_tokens)
    result = UpdateResult(has_critic=config.ppo.has_critic)
    if not policy.reads_whole_rows:
        batch = batch.steps()
    if config.group.skip_zero_variance and not bool((signal_B := has_reward_variance(batch)).all()):
        batch = batch.rows(signal_B.nonzero().flatten())
    if not len(batch):  # no group is left, or a single step that only reset
        return result
    rows_per_minibatch = max(1, config.ppo.batch_size // batch.row_size)
    for group in optimizer.param_groups:
        group["lr"] = (config.ppo.learning_rate if learning_rate is None else learning_rate) * group.get(
            "scale", 1.0
        )
    by_autograd: AbstractContextManager[Any] = nullcontext((None, optimizer))
    is_whitened = config.ppo.normalize_advantage and config.ppo.has_critic and batch.objective == "policy"
    if is_whitened and rows_per_minibatch >= len(batch) > 1:
        # All in one minibatch: its mean and spread are the same in every epoch.
        assert batch.advantages_BT is not None
        batch = replace(batch, advantages_BT=whiten(batch.advantages_BT, batch.mask_BT))
        whitened = config.ppo.model_copy(update={"normalize_advantage": False})
        config = config.model_copy(update={"ppo": whitened})
    with policy.closed_form(optimizer) or by_autograd as (accumulate, optimizer):
        gradient = functools.partial(
            accumulate_gradient,
            policy,
            config=config,
            optimizer=optimizer,
            budget=budget,
            accumulate=accumulate,
        )
        for _ in range(config.ppo.n_epochs):
            for piece, rows in minibatches(batch, rows_per_minibatch, generator):
                stats = gradient(piece, rows, step=result.steps + result.skipped)
                if before_first_step is not None:
                    before_first_step(stats)
                    before_first_step = None
                result.add(stats)
                if (
                    config.ppo.target_kl is not None
                    and float(stats.approx_kl / stats.steps) > config.ppo.target_kl
                ):
                    result.stopped_early = True
                    return _finish(result)
                take_step(optimizer, stats, config.ppo, result)
    return _finish(result)


def accumulate_gradient(
    policy: Policy,
    batch: Batch,
    rows: Tensor,
    *,
    config: Config,
    optimizer: torch.optim.Adam,
    budget: TokenBudget,
    accumulate: Callable[..., LossStats] | None = None,
    step: int = 0,
) -> LossStats:
    """Gradient of the minibatch `rows`, accumulated over micro-batches; its statistics. Out of memory: smaller ones.

    `step` is the update's step that it is for: which demonstrations are added.
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            if batch.objective == "imitation":
                return _imitate(policy, batch, rows, token_budget=budget.tokens)
            if batch.objective != "policy":
                return _judge(policy, batch, rows, token_budget=budget.tokens)
            stats = _accumulate(
                policy, batch, rows, config=config, token_budget=budget.tokens, accumulate=accumulate
            )
            if not (coef := ptx_coef(batch, config)):
                return stats
            assert batch.demonstrations is not None, "ptx needs the batch's demonstrations"
            examples = batch.demonstrations(step)
            everything = torch.arange(len(examples))
            return replace(
                stats, imitation=_imitate(policy, examples, everything, token_budget=budget.tokens, coef=coef)
            )
        except torch.OutOfMemoryError as error:
            budget.shrink(error, smallest=int(batch.mask_BT.shape[1]))


def ptx_coef(batch: Batch, config: Config) -> float:
    """Weight of the demonstrations in the loss of such a batch; 0 also while the critic alone learns."""
    is_warm = batch.version >= config.policy.critic.warmup_updates
    return config.ptx.coef if config.ptx is not None and is_warm else 0.0


def _accumulate(
    policy: Policy,
    batch: Batch,
    rows: Tensor,
    *,
    config: Config,
    token_budget: int,
    accumulate: Callable[..., LossStats] | None,
) -> LossStats:
    advantages_BT, steps = _minibatch_advantages(batch, rows, config, as_arrays=accumulate is not None)
    weights_BT, denominator = _aggregation(batch, rows, config, steps)
    settings = _loss_settings(batch, config)
    total: LossStats | None = None
    for micro in micro_batches(batch, rows, token_budget):
        part = batch if len(micro) == len(batch) else batch.rows(micro)
        # In the order of the part's rows, which where it is the whole batch is not the order of `micro`.
        places: Any = ... if part is batch else (micro, slice(part.mask_BT.shape[1]))
        if accumulate is not None:
            stats = accumulate(part, advantages_BT[places], denominator=denominator, settings=settings)
        else:
            old = (part.logprobs_BT, part.values_BT)
            loss, stats = ppo_loss(
                _trained(policy.evaluate(part, entropy_gradient=config.ppo.ent_coef > 0), part, config),
                old if part.reference_logprobs_BT is None else (*old, part.reference_logprobs_BT),
                advantages_BT=advantages_BT[places],
                # Without a critic its values are their own target: no loss.
                returns_BT=part.values_BT if part.returns_BT is None else part.returns_BT,
                mask_BT=part.mask_BT,
                denominator=denominator,
                settings=settings,
                weights_BT=None if weights_BT is None else weights_BT[places],
            )
            loss.backward()
        total = stats if total is None else total + stats
    assert total is not None
    return total


def _trained(new: Evaluation, batch: Batch, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and entropies for the loss; what is not trained has no gradient, so the optimiser passes it by."""
    if not config.ppo.has_critic:
        return new.logprobs_BT, batch.values_BT, new.entropies_BT
    if batch.version < config.policy.critic.warmup_updates:
        return new.logprobs_BT.detach(), new.values_BT, new.entropies_BT.detach()
    return new.logprobs_BT, new.values_BT, new.entropies_BT


def _minibatch_advantages(batch: Batch, rows: Tensor, config: Config, *, as_arrays: bool) -> tuple[Any, int]:
    """Advantages [B, T] as the loss of the minibatch `rows` counts them, and the minibatch's steps."""
    assert batch.advantages_BT is not None, "call advantages(batch) first"
    is_whole = len(rows) == len(batch)  # then the order of the rows does not matter: nothing need be picked
    advantages_BT: Any = batch.advantages_BT
    mask_BT: Any = batch.mask_BT
    if as_arrays:
        advantages_BT, mask_BT = advantages_BT.numpy(), mask_BT.numpy()
    steps = int((mask_BT if is_whole else mask_BT[rows]).sum())
    if (
        config.ppo.normalize_advantage and config.ppo.has_critic and steps > 1
    ):  # one advantage alone has no spread to divide by
        # Over the minibatch, before it is split: a micro-batch's own mean and variance would change the gradient.
        if is_whole:
            advantages_BT = whiten(advantages_BT, mask_BT)
        else:
            whitened_BT = library_of(advantages_BT).zeros_like(advantages_BT)
            whitened_BT[rows] = whiten(advantages_BT[rows], mask_BT[rows])
            advantages_BT = whitened_BT
    if config.generation.tis_cap is not None and batch.behaviour_logprobs_BT is not None:
        # The clipped loss is proportional to the advantage: a weight of one is a weight of the other.
        weight_BT = truncated_ratio(
            batch.logprobs_BT, batch.behaviour_logprobs_BT, cap=config.generation.tis_cap
        )
        advantages_BT = advantages_BT * weight_BT
    return advantages_BT, steps


def _aggregation(batch: Batch, rows: Tensor, config: Config, steps: int) -> tuple[Tensor | None, int]:
    """What each step counts [B, T] (None: 1) in the loss of the minibatch `rows`, and what their sum is divided by."""
    if config.ppo.loss_aggregation == "token":
        return None, max(steps, 1)
    lengths_B = batch.mask_BT.sum(1)
    answers = max(int((lengths_B[rows] > 0).sum()), 1)
    if config.ppo.loss_aggregation == "sequence":
        return batch.mask_BT / lengths_B.clamp(min=1)[:, None], answers
    assert batch.step_limit is not None, "loss_aggregation: constant needs the batch's step_limit"
    return None, answers * batch.step_limit


def _loss_settings(batch: Batch, config: Config) -> LossSettings:
    is_in_loss = config.kl.placement == "loss" and batch.reference_logprobs_BT is not None
    return LossSettings(
        clip_range=config.ppo.clip_range,
        clip_range_vf=config.ppo.clip_range_vf,
        vf_coef=config.ppo.vf_coef * (2.0 if config.ppo.value_loss == "squared" else 1.0),  # of ½ (V - R)²
        ent_coef=config.ppo.ent_coef,
        clip_range_high=config.ppo.clip_range_high,
        dual_clip=config.ppo.dual_clip,
        kl_coef=config.kl.coef if is_in_loss else 0.0,
    )


def _imitate(
    policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int, coef: float = 1.0
) -> LossStats:
    denominator = max(int(batch.mask_BT[rows].sum()), 1)
    total: LossStats | None = None
    for micro in micro_batches(batch, rows, token_budget):
        part = batch.rows(micro)
        new = policy.evaluate(part)
        loss, stats = nll_loss(
            new.logprobs_BT, new.entropies_BT, mask_BT=part.mask_BT, denominator=denominator
        )
        (coef * loss).backward()
        total = stats if total is None else total + stats
    assert total is not None
    return total


def _judge(policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> LossStats:
    total: LossStats | None = None
    sides = batch.observations["lengths"].shape[1]
    for micro in micro_batches(batch, rows, token_budget // sides):
        part = batch.rows(micro)
        assert callable(part.objective) and part.labels_B is not None
        losses_B = part.objective(policy.evaluate(part).values_BT, part.labels_B)
        (losses_B.sum() / len(rows)).backward()
        stats = preference_stats(losses_B)
        total = stats if total is None else total + stats
    assert total is not None
    return total


def take_step(optimizer: torch.optim.Adam, stats: LossStats, config: PPOConfig, result: UpdateResult) -> None:
    """Clip the gradient and step, or skip the step if anything is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(
        torch.linalg.vector_norm(gradients[0])
        if len(gradients) == 1
        else torch.nn.utils.get_total_norm(gradients)
    )
    if not (math.isfinite(norm) and stats.is_finite):
        optimizer.zero_grad(set_to_none=True)
        result.skipped += 1
        result.skipped_in_a_row += 1
        return
    if norm > config.max_grad_norm:
        for gradient in gradients:
            gradient.mul_(config.max_grad_norm / (norm + 1e-6))
    optimizer.step()
    result.grad_norm += norm
    result.steps += 1
    result.skipped_in_a_row = 0


def _finish(result: UpdateResult) -> UpdateResult:
    result.grad_norm /= max(result.steps, 1)
    return result

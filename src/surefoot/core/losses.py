"""The PPO loss. Every term is a sum over masked steps divided by a denominator that the caller passes in.

The denominator is the step count of the whole minibatch, so splitting it into micro-batches, padding it or spreading
it over processes changes neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.core.kl import MAX_LOG_RATIO
from surefoot.core.masked import library_of, masked_sum


@dataclass(frozen=True)
class LossSettings:
    """What shapes the loss. `clip_range_vf=None` leaves the value loss unclipped."""

    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0


@dataclass(frozen=True)
class LossStats:
    """Sums over the masked steps of one micro-batch, in the order of `NAMES`; they add up over micro-batches. Detached.

    Each name is also an attribute, a scalar tensor; means are these divided by `steps`. `ratio_max` is a maximum.
    """

    NAMES = ("policy_loss", "value_loss", "entropy", "ratio", "approx_kl", "clipped", "value_clipped", "steps")
    policy_loss = property(lambda self: self.sums[0])
    value_loss = property(lambda self: self.sums[1])
    entropy = property(lambda self: self.sums[2])
    ratio = property(lambda self: self.sums[3])
    approx_kl = property(lambda self: self.sums[4])  # k3 of KL(old‖new): never negative, unlike mean(old - new)
    clipped = property(lambda self: self.sums[5])
    value_clipped = property(lambda self: self.sums[6])
    steps = property(lambda self: self.sums[7])

    sums: Any  # [8] float32, a tensor or an array
    ratio_max: Any

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers."""
        return math.isfinite(float(self.sums[:2].sum()))

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(self.sums + other.sums, library_of(self.sums).maximum(self.ratio_max, other.ratio_max))


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """max(-A r, -A clip(r, 1-ε, 1+ε)) per step (Schulman et al. 2017, arXiv:1707.06347, eq. 7); same shape.

    `log_ratio` is log π_new - log π_old in nats; it is clamped to ±20 before `exp` so that no ratio overflows.
    """
    loss: Tensor = _policy_terms(torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)), advantages, clip_range)[0]
    return loss


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """½ (V - R)² per step; with `clip_range` c, ½ max((V - R)², (clip(V, V_old ± c) - R)²).

    Clipping is OpenAI baselines' (`ppo2/model.py`). Mind its known trap: where the clipped branch is the larger, the
    gradient is exactly 0, even if V is far from R.
    """
    loss: Tensor = _value_terms(values, old_values, returns, clip_range)[0]
    return loss


def _policy_terms(ratio: Any, advantages: Any, clip_range: float) -> tuple[Any, Any, Any]:
    """The clipped surrogate per step; its derivative by log π_new, -A r where that branch counts, else 0; the clipped ratio."""
    xp = library_of(ratio)
    within = xp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    unclipped, clipped = -advantages * ratio, -advantages * within
    return xp.maximum(unclipped, clipped), xp.where(unclipped >= clipped, unclipped, 0.0), within


def _value_terms(values: Any, old_values: Any, returns: Any, clip_range: float | None) -> tuple[Any, Any, Any]:
    """The value loss per step; its derivative by V, V - R where that branch counts, else 0; whether V left the clip range."""
    xp = library_of(values)
    error = values - returns
    squares = error * error
    if clip_range is None:
        return 0.5 * squares, error, xp.zeros_like(error)
    within = xp.minimum(xp.maximum(values, old_values - clip_range), old_values + clip_range)
    clipped = (within - returns) ** 2
    return 0.5 * xp.maximum(squares, clipped), xp.where(squares >= clipped, error, 0.0), within != values


def ppo_loss(
    new: tuple[Tensor, Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    *,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    denominator: float | Tensor,
    settings: LossSettings,
) -> tuple[Tensor, LossStats]:
    """Policy loss + `vf_coef` · value loss - `ent_coef` · entropy, summed over the mask and divided by `denominator`.

    `new` is (logprobs, values, entropies) with gradient, `old` is (logprobs, values) from before the update, all
    [B, T] float32. Returns the scalar loss and the statistics of this micro-batch.
    """
    fixed = (*(x.detach() for x in old), advantages_BT, returns_BT)
    loss, sums, ratio_max = _PPOLoss.apply(*new, *fixed, mask_BT, denominator, settings)
    return loss, LossStats(sums, ratio_max)


def imitation_loss(
    logprobs_BT: Tensor, entropies_BT: Tensor, *, mask_BT: Tensor, denominator: float | Tensor
) -> tuple[Tensor, LossStats]:
    """Negative log-likelihood of what others wrote: -log π summed over the mask and divided by `denominator`, nats.

    Arguments [B, T], bool mask, float32 the others. The statistics have it as `policy_loss`; with no older policy to
    compare with, the ratio is 1.
    """
    total = masked_sum(-logprobs_BT, mask_BT)
    steps, zero = mask_BT.sum(), torch.zeros_like(total)
    entropy = masked_sum(entropies_BT, mask_BT)
    sums = torch.stack([total.detach(), zero, entropy.detach(), steps.float(), zero, zero, zero, steps.float()])
    return total / denominator, LossStats(sums, torch.ones_like(total))


@torch.no_grad()
def loss_and_gradients(
    new: tuple[Any, Any, Any],
    old: tuple[Any, Any],
    targets: tuple[Any, Any],
    *,
    mask_BT: Any,
    denominator: float | Tensor,
    settings: LossSettings,
) -> tuple[Any, LossStats, tuple[Any, Any, Any]]:
    """The loss, and its gradients by log-probs, values and entropies [B, T] (None for the last without `ent_coef`).

    Arguments as `ppo_loss`, tensors or NumPy arrays, all of one kind; `targets` are (advantages, returns). What is masked
    is replaced last, in the sums and in the gradients: a NaN there reaches neither.
    """
    (logprobs, values, entropies), (old_logprobs, old_values), (advantages, returns) = new, old, targets
    xp = library_of(logprobs)
    log_ratio = logprobs - old_logprobs
    bounded = xp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = xp.exp(bounded)
    policy, by_logprob, within = _policy_terms(ratio, advantages, settings.clip_range)
    value, by_value, moved = _value_terms(values, old_values, returns, settings.clip_range_vf)
    # One sum for all of them: a small network spends more time on starting operations than on numbers.
    summed = (policy, value, entropies, ratio, xp.expm1(bounded) - bounded, ratio != within, moved, mask_BT)
    masked = xp.where(mask_BT, xp.stack(summed), 0.0)
    sums, scale = masked.sum((1, 2)), 1.0 / denominator
    loss = (sums[0] + settings.vf_coef * sums[1]) * scale
    by_entropy = None
    if settings.ent_coef:
        loss = loss - settings.ent_coef * scale * sums[2]
        by_entropy = mask_BT * (-settings.ent_coef * scale)
    gradients = (
        xp.where(mask_BT & (bounded == log_ratio), by_logprob * scale, 0.0),
        xp.where(mask_BT, by_value * (settings.vf_coef * scale), 0.0),
        by_entropy,
    )
    return loss, LossStats(sums, masked[3].max()), gradients


class _PPOLoss(torch.autograd.Function):
    """`loss_and_gradients` as one node of autograd, instead of thirty."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        *tensors, mask, denominator, settings = arguments
        loss, stats, ctx.gradients = loss_and_gradients(
            tuple(tensors[:3]),
            tuple(tensors[3:5]),
            tuple(tensors[5:]),
            mask_BT=mask,
            denominator=denominator,
            settings=settings,
        )
        ctx.mark_non_differentiable(stats.sums, stats.ratio_max)
        return loss, stats.sums, stats.ratio_max

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if own is None else own * gradients[0] for own in ctx.gradients), *[None] * 7)

"""The PPO loss. Every term is a sum over masked steps divided by a denominator that the caller passes in.

The denominator and the weights of the steps, where they have any, are those of the whole minibatch, so splitting it into
micro-batches, padding it or spreading it over processes changes neither loss nor gradient.
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
    """What shapes the loss. `clip_range_vf=None` leaves the value loss unclipped, `clip_range_high=None` is `clip_range`.

    `dual_clip` c bounds the loss of a bad step by c |A|; `kl_coef` is the weight of the KL term, 0 if the KL is in the reward.
    """

    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    clip_range_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0


@dataclass(frozen=True)
class LossStats:
    """Sums over the masked steps of one micro-batch, in the order of `NAMES`; they add up over micro-batches. Detached.

    Each name is also an attribute, a scalar tensor; means are these divided by `steps`. `ratio_max` is a maximum.
    `imitation` has those of demonstrations whose loss was added.
    """

    NAMES = (
        "policy_loss",
        "value_loss",
        "entropy",
        "ratio",
        "approx_kl",
        "clipped",
        "value_clipped",
        "steps",
    )
    policy_loss = property(lambda self: self.sums[0])
    value_loss = property(lambda self: self.sums[1])
    entropy = property(lambda self: self.sums[2])
    ratio = property(lambda self: self.sums[3])
    approx_kl = property(
        lambda self: self.sums[4]
    )  # k3 of KL(old‖new): never negative, unlike mean(old - new)
    clipped = property(lambda self: self.sums[5])
    value_clipped = property(lambda self: self.sums[6])
    steps = property(lambda self: self.sums[7])

    sums: Any  # [8] float32, a tensor or an array
    ratio_max: Any
    imitation: LossStats | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers."""
        return math.isfinite(float(self.sums[:2].sum())) and (
            self.imitation is None or self.imitation.is_finite
        )

    def __add__(self, other: LossStats) -> LossStats:
        imitated = [stats.imitation for stats in (self, other) if stats.imitation is not None]
        return LossStats(
            self.sums + other.sums,
            library_of(self.sums).maximum(self.ratio_max, other.ratio_max),
            imitated[0] + imitated[1] if len(imitated) == 2 else next(iter(imitated), None),
        )


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """max(-A r, -A clip(r, 1-ε, 1+ε)) per step (Schulman et al. 2017, arXiv:1707.06347, eq. 7); same shape.

    `log_ratio` is log π_new - log π_old in nats; it is clamped to ±20 before `exp` so that no ratio overflows. With
    `clip_range_high` the upper bound is 1 + that (Yu et al. 2025, DAPO, arXiv:2503.14476, §3.1). With `dual_clip` c > 1 the
    loss is at most -c A where A < 0, however large the ratio (Ye et al. 2020, arXiv:1912.09729, eq. 5).
    """
    settings = LossSettings(clip_range, clip_range_high=clip_range_high, dual_clip=dual_clip)
    loss: Tensor = _policy_terms(
        torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)), advantages, settings
    )[0]
    return loss


def truncated_ratio(logprobs: Tensor, behaviour_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(π / μ, cap) per step, same shape: what a sample of the sampler μ counts for the trainer's π.

    Both are log-probs before the update, nats: the ratio corrects for two programs that compute one policy, not for its
    training (Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "On the rollout-training mismatch in modern
    RL systems", openreview.net/forum?id=xsonlP8DRV).
    """
    return torch.exp((logprobs - behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=cap)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """½ (V - R)² per step; with `clip_range` c, ½ max((V - R)², (clip(V, V_old ± c) - R)²).

    Clipping is OpenAI baselines' (`ppo2/model.py`). Mind its known trap: where the clipped branch is the larger, the
    gradient is exactly 0, even if V is far from R.
    """
    loss: Tensor = _value_terms(values, old_values, returns, clip_range)[0]
    return loss


def _policy_terms(ratio: Any, advantages: Any, settings: LossSettings) -> tuple[Any, Any, Any]:
    """The clipped surrogate per step; its derivative by log π_new, -A r where that branch counts, else 0; the clipped ratio."""
    xp = library_of(ratio)
    high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
    within = xp.clip(ratio, 1.0 - settings.clip_range, 1.0 + high)
    unclipped, clipped = -advantages * ratio, -advantages * within
    loss, slope = xp.maximum(unclipped, clipped), xp.where(unclipped >= clipped, unclipped, 0.0)
    if settings.dual_clip is not None:
        most = -settings.dual_clip * advantages
        is_past = (advantages < 0) & (loss > most)
        loss, slope = xp.where(is_past, most, loss), xp.where(is_past, 0.0, slope)
    return loss, slope, within


def _value_terms(
    values: Any, old_values: Any, returns: Any, clip_range: float | None
) -> tuple[Any, Any, Any]:
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
    old: tuple[Tensor, ...],
    *,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    denominator: float | Tensor,
    settings: LossSettings,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """Policy loss + `vf_coef` · value loss - `ent_coef` · entropy, summed over the mask and divided by `denominator`.

    `new` is (logprobs, values, entropies) with gradient, `old` is (logprobs, values) from before the update, and with
    `kl_coef` β also the reference's logprobs, all [B, T] float32. Then β · ρ ½ (log π_new - log π_ref)² is added, the
    ratio ρ = π_new / π_old without gradient: k2, whose gradient is that of KL(π_new‖π_ref) at the states of the batch,
    after the first step too. (k1 in a loss pulls nowhere, and k3 towards the forward KL: `core/kl.py`.)

    `weights_BT` (None: all 1) is what each step counts in every term. Returns the scalar loss, and the statistics of this
    micro-batch, in which all steps count alike.
    """
    fixed = {"mask_BT": mask_BT, "denominator": denominator, "settings": settings, "weights_BT": weights_BT}
    loss, sums, ratio_max = _PPOLoss.apply(*new, old, (advantages_BT, returns_BT), fixed)
    return loss, LossStats(sums, ratio_max)


def nll_loss(
    logprobs_BT: Tensor, entropies_BT: Tensor, *, mask_BT: Tensor, denominator: float | Tensor
) -> tuple[Tensor, LossStats]:
    """Negative log-likelihood of what others wrote: -log π summed over the mask and divided by `denominator`, nats.

    Arguments [B, T], bool mask, float32 the others. The statistics have it as `policy_loss`; with no older policy to
    compare with, the ratio is 1.
    """
    total = masked_sum(-logprobs_BT, mask_BT)
    steps, zero = mask_BT.sum(), torch.zeros_like(total)
    entropy = masked_sum(entropies_BT, mask_BT)
    sums = torch.stack(
        [total.detach(), zero, entropy.detach(), steps.float(), zero, zero, zero, steps.float()]
    )
    return total / denominator, LossStats(sums, torch.ones_like(total))


@torch.no_grad()
def loss_and_gradients(
    new: tuple[Any, Any, Any],
    old: tuple[Any, ...],
    targets: tuple[Any, Any],
    *,
    mask_BT: Any,
    denominator: float | Tensor,
    settings: LossSettings,
    weights_BT: Any = None,
) -> tuple[Any, LossStats, tuple[Any, Any, Any]]:
    """The loss, and its gradients by log-probs, values and entropies [B, T] (None for the last without `ent_coef`).

    Arguments as `ppo_loss`, tensors or NumPy arrays, all of one kind; `targets` are (advantages, returns). What is masked
    is replaced last, in the sums and in the gradients: a NaN there reaches neither.
    """
    (logprobs, values, entropies), (old_logprobs, old_values, *reference), (advantages, returns) = (
        new,
        old,
        targets,
    )
    xp = library_of(logprobs)
    log_ratio = logprobs - old_logprobs
    bounded = xp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = xp.exp(bounded)
    policy, by_logprob, within = _policy_terms(ratio, advantages, settings)
    value, by_value, moved = _value_terms(values, old_values, returns, settings.clip_range_vf)
    # One sum for all of them: a small network spends more time on starting operations than on numbers.
    summed = (policy, value, entropies, ratio, xp.expm1(bounded) - bounded, ratio != within, moved, mask_BT)
    masked = xp.where(mask_BT, xp.stack(summed), 0.0)
    sums, scale = masked.sum((1, 2)), 1.0 / denominator
    counted, by_entropy = sums, None
    if weights_BT is not None:
        weights = xp.where(mask_BT, weights_BT, 0.0)
        counted = (masked[:3] * weights).sum((1, 2))
        scale_BT: Any = weights * scale
    else:
        scale_BT = scale
    loss = (counted[0] + settings.vf_coef * counted[1]) * scale
    if settings.ent_coef:
        loss = loss - settings.ent_coef * scale * counted[2]
        by_entropy = mask_BT * (-settings.ent_coef * scale_BT)
    if settings.kl_coef:
        off = logprobs - reference[0]
        loss = loss + settings.kl_coef * xp.where(mask_BT, 0.5 * ratio * off * off * scale_BT, 0.0).sum()
        by_logprob = by_logprob + settings.kl_coef * ratio * off
    gradients = (
        xp.where(mask_BT & (bounded == log_ratio), by_logprob * scale_BT, 0.0),
        xp.where(mask_BT, by_value * (settings.vf_coef * scale_BT), 0.0),
        by_entropy,
    )
    return loss, LossStats(sums, masked[3].max()), gradients


class _PPOLoss(torch.autograd.Function):
    """`loss_and_gradients` as one node of autograd, instead of thirty."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        *new, old, targets, fixed = arguments
        loss, stats, ctx.gradients = loss_and_gradients((new[0], new[1], new[2]), old, targets, **fixed)
        ctx.mark_non_differentiable(stats.sums, stats.ratio_max)
        return loss, stats.sums, stats.ratio_max

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if own is None else own * gradients[0] for own in ctx.gradients), *[None] * 3)

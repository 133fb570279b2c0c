"""The PPO loss. Every term is a sum over masked steps divided by a denominator that the caller passes in.

The denominator is the step count of the whole minibatch, so splitting it into micro-batches, padding it or spreading
it over processes changes neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.core.kl import MAX_LOG_RATIO
from surefoot.core.masked import masked_sum


@dataclass(frozen=True)
class LossSettings:
    """What shapes the loss. `clip_range_vf=None` leaves the value loss unclipped."""

    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0


@dataclass(frozen=True)
class LossStats:
    """Sums over the masked steps of one micro-batch; they add up over micro-batches. Scalars, detached.

    `ratio_max` takes the maximum instead. Means are these divided by `steps`.
    """

    steps: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    ratio: Tensor
    ratio_max: Tensor
    approx_kl: Tensor  # k3 of KL(old‖new): never negative, unlike mean(old - new)
    clipped: Tensor
    value_clipped: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers."""
        return math.isfinite(float(self.policy_loss + self.value_loss))

    def __add__(self, other: LossStats) -> LossStats:
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        sums["ratio_max"] = torch.maximum(self.ratio_max, other.ratio_max)
        return LossStats(**sums)


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """max(-A r, -A clip(r, 1-ε, 1+ε)) per step (Schulman et al. 2017, arXiv:1707.06347, eq. 7); same shape.

    `log_ratio` is log π_new - log π_old in nats; it is clamped to ±20 before `exp` so that no ratio overflows.
    """
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """½ (V - R)² per step; with `clip_range` c, ½ max((V - R)², (clip(V, V_old ± c) - R)²).

    Clipping is OpenAI baselines' (`ppo2/model.py`). Mind its known trap: where the clipped branch is the larger, the
    gradient is exactly 0, even if V is far from R.
    """
    loss = (values - returns) ** 2
    if clip_range is not None:
        clipped = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


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
    # Masked entries are replaced before any arithmetic: a NaN behind `where` would still poison the gradient.
    zero = torch.zeros_like(mask_BT, dtype=torch.float32)
    logprobs, values, entropies = (torch.where(mask_BT, x, zero) for x in new)
    old_logprobs, old_values = (torch.where(mask_BT, x, zero) for x in old)
    advantages, returns = torch.where(mask_BT, advantages_BT, zero), torch.where(mask_BT, returns_BT, zero)

    log_ratio = logprobs - old_logprobs
    per_step_policy = clipped_policy_loss(log_ratio, advantages, clip_range=settings.clip_range)
    per_step_value = value_loss(values, old_values, returns, clip_range=settings.clip_range_vf)
    per_step = per_step_policy + settings.vf_coef * per_step_value
    if settings.ent_coef:
        per_step = per_step - settings.ent_coef * entropies
    loss = masked_sum(per_step, mask_BT) / denominator

    with torch.no_grad():
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = torch.exp(bounded)
        value_moved = (values - old_values).abs() > (settings.clip_range_vf or float("inf"))
        stats = LossStats(
            steps=mask_BT.sum(),
            policy_loss=masked_sum(per_step_policy, mask_BT),
            value_loss=masked_sum(per_step_value, mask_BT),
            entropy=masked_sum(entropies, mask_BT),
            ratio=masked_sum(ratio, mask_BT),
            ratio_max=torch.where(mask_BT, ratio, zero).max(),
            approx_kl=masked_sum(torch.expm1(bounded) - bounded, mask_BT),
            clipped=masked_sum(((ratio - 1.0).abs() > settings.clip_range).float(), mask_BT),
            value_clipped=masked_sum(value_moved.float(), mask_BT),
        )
    return loss, stats

"""The losses, sums over masked tokens (or rows); what a token counts, one over their number, is passed in.

That number is the whole minibatch's, so splitting it into micro-batches, padding it or spreading it over
processes changes neither loss nor gradient. What is masked is replaced before anything else is done: a NaN
there reaches nothing.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.core.kl import MAX_LOG_RATIO, k2, k3
from surefoot.core.masked import masked_sum


@dataclass(frozen=True)
class LossSettings:
    """What shapes the PPO loss. `clip_range_high` None: `clip_range`; `kl_coef` is the KL term's weight.

    `cispo`: CISPO's loss in place of the clipped surrogate; `sequence_ratio`: GSPO's ratio.
    """

    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    clip_range_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0
    cispo: bool = False
    sequence_ratio: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the ratio is not clipped."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return 0.0 if self.cispo else 1.0 - self.clip_range, 1.0 + high


@dataclass(frozen=True)
class PPOStats:
    """Sums over the tokens of a minibatch, float32 scalars without gradient (tensors, or NumPy's). Means are
    these divided by `num_tokens`; `ratio_max` is a maximum.
    """

    policy_loss: Any
    value_loss: Any
    entropy: Any
    ratio: Any
    approx_kl: Any  # k3 of KL(old‖new): never negative, unlike mean(old - new)
    clipped: Any
    value_clipped: Any
    num_tokens: Any
    ratio_max: Any
    nll: Any = 0.0  # of demonstrations that are mixed in, and their trained tokens
    nll_tokens: Any = 0

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers."""
        return math.isfinite(float(self.policy_loss + self.value_loss + self.nll))

    def __add__(self, other: "PPOStats") -> "PPOStats":
        added = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return PPOStats(**added | {"ratio_max": max(self.ratio_max, other.ratio_max)})


def clipped_surrogate(ratio: Tensor, advantages: Tensor, settings: LossSettings) -> Tensor:
    """max(-A r, -A clip(r, 1 - ε, 1 + ε)), same shape (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    `clip_range_high` is the upper bound's ε (Yu et al. 2025, DAPO, arXiv:2503.14476, §3.1). With `dual_clip`
    c > 1 the loss is at most -c A where A < 0, however large the ratio (Ye et al. 2020, arXiv:1912.09729, eq.
    5).
    """
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(*settings.bounds))
    if settings.dual_clip is not None:
        bound = -settings.dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > bound), bound, loss)
    return loss


def cispo_loss(ratio: Tensor, advantages: Tensor, logprobs: Tensor, settings: LossSettings) -> Tensor:
    """-min(r, 1 + ε_high) A log π, the ratio without gradient, same shape.

    No token's gradient is cut off, only its weight is (MiniMax 2025, arXiv:2506.13585, eq. 4; without a lower
    bound, as there and in TRL).
    """
    return -ratio.detach().clamp(*settings.bounds) * advantages * logprobs


def sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each row's mean over the mask, at all of its tokens, [B, T]; 0 off the mask, where it must be 0.

    Its exp is the ratio of whole sequences to the power of 1 / length (Zheng et al. 2025, GSPO,
    arXiv:2507.18071, eq. 7).
    """
    mean_B = log_ratio_BT.sum(1) / mask_BT.sum(1).clamp(min=1)
    return torch.where(mask_BT, mean_B[:, None], 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """½ (V - R)² per token; with `clip_range` c, ½ max((V - R)², (clip(V, V_old ± c) - R)²). Same shape.

    Clipping is OpenAI baselines' (`ppo2/model.py`). Mind its known trap: where the clipped branch is the
    larger, the gradient is exactly 0, even if V is far from R.
    """
    squares = (values - returns) ** 2
    if clip_range is not None:
        clipped = values.clamp(old_values - clip_range, old_values + clip_range)
        squares = torch.maximum(squares, (clipped - returns) ** 2)
    return 0.5 * squares


def ppo_loss(
    new: tuple[Tensor, Tensor, Tensor],
    old: tuple[Tensor, ...],
    *,
    advantages_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    scale: float | Tensor,
    settings: LossSettings,
) -> tuple[Tensor, PPOStats]:
    """Σ scale · (surrogate + vf_coef · value loss - ent_coef · entropy), a scalar; and the sums.

    Arguments, all [B, T] float32 but the mask (bool):
        new: log-probs, values and entropies, with gradient.
        old: log-probs and values from before the update; with `kl_coef` also the reference's log-probs.
        scale: what a token counts, in every term: 1 / tokens of the minibatch, or [B, T]. The sums count all
        tokens alike.

    The log-ratio is clamped to ±20 before `exp`, so that no ratio overflows. With `kl_coef` β comes β ρ ½
    (log π_new - log π_ref)², the token's ratio ρ without gradient: k2, whose gradient is that of
    KL(π_new‖π_ref) at the states of the batch, after the first step too. (k1 in a loss pulls nowhere, and k3
    towards the forward KL: `core/kl.py`.)
    """
    inputs = (*new, advantages_BT, returns_BT, *old)
    logprobs, values, entropies, advantages, returns, old_logprobs, old_values, *reference = (
        torch.where(mask_BT, value, 0.0) for value in inputs
    )
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = token_ratio = torch.exp(log_ratio)
    if settings.sequence_ratio:
        ratio = torch.exp(sequence_log_ratio(log_ratio, mask_BT))
    if settings.cispo:
        surrogate = cispo_loss(ratio, advantages, logprobs, settings)
    else:
        surrogate = clipped_surrogate(ratio, advantages, settings)
    policy, value = surrogate, value_loss(values, old_values, returns, settings.clip_range_vf)
    if settings.kl_coef:
        policy = surrogate + settings.kl_coef * (token_ratio.detach() * k2(logprobs, reference[0]))
    loss = scaled_sum(policy, logprobs, scale) + (value * (settings.vf_coef * scale)).sum()
    if settings.ent_coef:
        loss = loss - (entropies * (settings.ent_coef * scale)).sum()
    with torch.no_grad():
        low, high = settings.bounds
        moved = torch.zeros_like(mask_BT)
        if (clip := settings.clip_range_vf) is not None:
            moved = values != values.clamp(old_values - clip, old_values + clip)
        approx_kl, clipped = k3(old_logprobs, logprobs), (ratio < low) | (ratio > high)
        terms = (surrogate, value, entropies, ratio, approx_kl, clipped, moved, mask_BT)
        sums = torch.where(mask_BT, torch.stack(terms), 0.0).sum((1, 2))
        return loss, PPOStats(*[*sums, torch.where(mask_BT, ratio, 0.0).max()])


def scaled_sum(terms_BT: Tensor, logprobs_BT: Tensor, scale: float | Tensor) -> Tensor:
    """Σ scale · term. By each log-prob the gradient is (∂ term / ∂ log-prob) · scale, rounded in this order.

    Autograd alone would begin with the scale. The order is that of the written-out gradient
    (`policies/control/fast_mlp.py`): a run's numbers don't depend on which of the two it takes, nor on the
    version of Surefoot that it began with.
    """
    if not logprobs_BT.requires_grad:
        return (terms_BT * scale).sum()
    (slope_BT,) = torch.autograd.grad(terms_BT.sum(), logprobs_BT, retain_graph=True)
    through_logprobs = (slope_BT * scale) * (logprobs_BT - logprobs_BT.detach())
    return (terms_BT.detach() * scale).sum() + through_logprobs.sum()


def truncated_ratio(logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(π / μ, cap) per token, same shape: what a sample of the sampler μ counts for the trainer's π.

    Both are log-probs before the update, nats: the ratio corrects for two programs that compute one policy,
    not for its training (Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "On the
    rollout-training mismatch in modern RL systems", openreview.net/forum?id=xsonlP8DRV).
    """
    return torch.exp((logprobs - behavior_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=cap)


@dataclass(frozen=True)
class LossStats:
    """Sums over the trained tokens of demonstrations, or over rows: float32 scalars without gradient."""

    loss: Any
    num_tokens: Any
    entropy: Any = 0.0
    # Of DPO's pairs: implicit rewards and log-probs, [2] with the chosen side first, and pairs in order.
    rewards: Any = 0.0
    logprobs: Any = 0.0
    in_order: Any = 0.0

    @property
    def mean(self) -> float:
        """Loss of a token, or of a row."""
        return float(self.loss / self.num_tokens)

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(float(self.loss))

    def __add__(self, other: "LossStats") -> "LossStats":
        return LossStats(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def nll_loss(logprobs_BT: Tensor, entropies_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, LossStats]:
    """Negative log-likelihood: -log π summed over the mask, nats; arguments [B, T], bool mask, float32."""
    total, entropy = masked_sum(-logprobs_BT, mask_BT), masked_sum(entropies_BT, mask_BT)
    return total, LossStats(total.detach(), mask_BT.sum().float(), entropy.detach())

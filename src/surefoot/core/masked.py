"""Sums, means and whitening over a mask. What is masked is inert, in value and gradient; NaN too."""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` (bool, same shape) is true; scalar."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 for an empty mask."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n, not n - 1) where `mask` is true; 0 for an empty mask."""
    differences = torch.where(mask, values, 0.0) - masked_mean(values, mask)
    return masked_mean(differences**2, mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance and, with `shift_mean`, move the mean to 0; 0 off the mask.

    `(x - mean) * rsqrt(var + 1e-8)` with population variance, as OpenAI's lm-human-preferences does
    (`lm_human_preferences/utils/core.py: whiten`). Equal values, or one, give 0 (unshifted: the mean).
    """
    mean = masked_mean(values, mask)
    centered = torch.where(mask, values - mean, 0.0)
    # Once more: the mean of equal large values is rounded, and what is left would be scaled up by 1e4.
    centered = torch.where(mask, centered - masked_mean(centered, mask), 0.0)
    whitened = centered / torch.sqrt(masked_mean(centered * centered, mask) + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(target - prediction) / Var(target): 1 perfect, 0 no better than a constant."""
    variance = masked_var(targets, mask)
    residual = masked_var(targets - predictions, mask)
    # Equal float32 targets have a variance of rounding errors: a spread below 1e-6 of their size is none.
    differ = variance > 1e-12 * masked_mean(targets**2, mask)
    return torch.where(differ, 1 - residual / variance.clamp(min=1e-30), torch.zeros_like(variance))

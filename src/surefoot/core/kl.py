"""KL estimators, the KL penalty in the reward, and the adaptive coefficient."""

import torch
from torch import Tensor

# exp(20) is 5e8: far past any ratio that can be trusted, far below overflow.
MAX_LOG_RATIO = 20.0


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log p_ref of the sampled action, nats: unbiased for KL(p‖p_ref) under p, may be negative.

    Names k1, k2, k3 from Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html, 2020). In
    the reward, k1 is the only one of the three whose policy gradient is the KL's own.
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """½ (log p - log p_ref)², nats: low variance, slightly biased, never negative."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r, r = p_ref / p, nats: unbiased, low variance, never negative. Not for rewards."""
    log_ratio = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def kl_penalized_rewards(
    rewards_BT: Tensor, logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor, *, coef: float
) -> Tensor:
    """r_t - β (log p_t - log p_ref,t) on the mask, 0 off it (Ziegler et al. 2019, arXiv:1909.08593)."""
    return torch.where(mask_BT, rewards_BT - coef * k1(logprobs_BT, reference_logprobs_BT), 0.0)


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """Ziegler's proportional controller (arXiv:1909.08593, §2.2).

    `kl` is the mean over `episodes` of the KL summed over tokens, nats. The error is clipped to ±0.2: β moves
    by ≤ 20 % in `horizon` episodes. Example: β 0.15, kl 12, target 6, horizon 1e4, 256 episodes -> 0.150768.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)

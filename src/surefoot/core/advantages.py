"""Generalised advantage estimation over the steps the policy itself took."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    *,
    mask_BT: Tensor,
    ends_BT: Tensor,
    bootstrap_BT: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and TD(λ) returns, both [B, T] float32, 0 off the mask.

    With s' the next masked step of the same trajectory (Schulman et al. 2015, arXiv:1506.02438, eq. 11, 16):

        δ_t = r_t + γ V(s') - V(s_t),    A_t = δ_t + γ λ A(s'),    R_t = A_t + V(s_t)

    Steps off the mask (prompt, padding, what an environment said between two turns) are stepped over: they carry no
    reward and cost no γ or λ. After a step with `ends_BT` the carry stops, and V(s') is `bootstrap_BT`: 0 where the
    episode terminated, V(final observation) where it was only truncated or the rollout stopped.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = torch.zeros_like(rewards_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    zeros_B = torch.zeros_like(next_value_B)
    for t in reversed(range(rewards_BT.shape[1])):
        ends_B, mask_B, value_B = ends_BT[:, t], mask_BT[:, t], values_BT[:, t]
        successor_B = torch.where(ends_B, bootstrap_BT[:, t], next_value_B)
        carried_B = torch.where(ends_B, zeros_B, next_advantage_B)
        delta_B = rewards_BT[:, t] + gamma * successor_B - value_B
        advantage_B = delta_B + gamma * lam * carried_B
        advantages_BT[:, t] = torch.where(mask_B, advantage_B, zeros_B)
        next_advantage_B = torch.where(mask_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_B, value_B, next_value_B)
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, torch.zeros_like(values_BT))
    return advantages_BT, returns_BT

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
    zero = torch.zeros((), device=rewards_BT.device)
    steps = mask_BT.shape[1]
    # The index of the next masked step after each one; `steps` where there is none.
    index_BT = torch.where(mask_BT, torch.arange(steps, device=mask_BT.device), steps)
    following_BT = index_BT.flip(1).cummin(1).values.flip(1)
    following_BT = torch.cat([following_BT[:, 1:], torch.full_like(following_BT[:, :1], steps)], 1)
    padded_BT = torch.cat([torch.where(mask_BT, values_BT, zero), torch.zeros_like(values_BT[:, :1])], 1)
    successor_BT = torch.where(ends_BT, bootstrap_BT, padded_BT.gather(1, following_BT))
    delta_BT = torch.where(mask_BT, rewards_BT + gamma * successor_BT - values_BT, zero)
    # Off the mask the advantage to come is handed on as it is; after an end nothing is.
    carried_BT = torch.where(mask_BT, torch.where(ends_BT, 0.0, gamma * lam), 1.0)
    advantage_B, backwards = torch.zeros_like(delta_BT[:, 0]), []
    for delta_B, carried_B in zip(reversed(delta_BT.unbind(1)), reversed(carried_BT.unbind(1)), strict=True):
        advantage_B = torch.addcmul(delta_B, carried_B, advantage_B)
        backwards.append(advantage_B)
    advantages_BT = torch.where(mask_BT, torch.stack(backwards[::-1], 1), zero)
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, zero)
    return advantages_BT, returns_BT

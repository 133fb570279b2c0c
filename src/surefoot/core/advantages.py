"""Advantages over the steps the policy took: with a critic (GAE), or within a group of completions."""

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
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Advantages and TD(λ) returns, both [B, T] float32, 0 off the mask.

    With s' the next masked step of the same trajectory (Schulman et al. 2015, arXiv:1506.02438, eq. 16):

        δ_t = r_t + γ V(s') - V(s_t),    A_t = δ_t + γ λ A(s'),    R_t = A_t + V(s_t)

    Steps off the mask (prompt, padding, what an environment said between two turns) are stepped over: they
    carry no reward and cost no γ or λ. After a step with `ends_BT` the carry stops, and V(s') is
    `bootstrap_BT`: 0 where the episode terminated, V(final observation) where it was only truncated or the
    rollout stopped. λ is one number, or one for each row, [B, 1].
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


def group_advantages(rewards_B: Tensor, groups_B: Tensor, *, acted_B: Tensor, kind: str) -> Tensor:
    """How much better each completion is than the others of its prompt; [B] float32, 0 where there is none.

    `rewards_B` are the rewards of whole completions, `groups_B` (int64) says which rows share a prompt,
    `acted_B` (bool) which rows count. With r the rewards of a group of G:

        dr_grpo    A = r - mean(r)                        (Liu et al. 2025, arXiv:2503.20783, §3.2)
        grpo       A = (r - mean(r)) / (std(r) + 1e-4)    (Shao et al. 2024, arXiv:2402.03300, §4.1.2)
        rloo       A = r - mean of the other G - 1        (Ahmadian et al. 2024, arXiv:2402.14740)
                     = G / (G - 1) · (r - mean(r))

    std divides by G - 1, and the 1e-4 keeps equal rewards at 0: both as TRL's `GRPOTrainer` has them.
    """
    # Pairs instead of a scatter: a group's sum is the same to the bit on every device.
    same_BB = (groups_B[:, None] == groups_B) & acted_B
    size_B = same_BB.sum(1).clamp(min=1)
    others_B = (size_B - 1).clamp(min=1)

    def mean(values_B: Tensor) -> Tensor:
        return torch.where(same_BB, values_B, 0.0).sum(1) / size_B

    centered_B = rewards_B - mean(rewards_B)
    # Once more: the mean of equal large rewards is rounded, and what is left would be scaled up.
    centered_B = torch.where(acted_B, centered_B - mean(centered_B), 0.0)
    if kind == "grpo":
        return centered_B / ((mean(centered_B**2) * size_B / others_B).sqrt() + 1e-4)
    return centered_B * size_B / others_B if kind == "rloo" else centered_B

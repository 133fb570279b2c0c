"""From trajectories to one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surefoot.data.batches import to_device
from surefoot.types import Batch, Trajectory


def text_batch(trajectories: Sequence[Trajectory], *, device: torch.device) -> Batch:
    """Right-padded [B, T] batch over prompt and answer; rewards are 0 until shaping fills them in.

    The mask comes from lengths, never from comparing tokens with a pad id. Rows must have at least one written token.
    """
    lengths = [len(t.prompt_tokens) + len(t.completion.tokens) for t in trajectories]
    shape = (len(trajectories), max(lengths))
    tokens_BT = torch.zeros(shape, dtype=torch.long)
    mask_BT, ends_BT = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    logprobs_BT, values_BT, rewards_BT = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for b, (t, length) in enumerate(zip(trajectories, lengths, strict=True)):
        start = len(t.prompt_tokens)
        tokens_BT[b, :length] = torch.tensor([*t.prompt_tokens, *t.completion.tokens])
        mask_BT[b, start:length] = True
        ends_BT[b, length - 1] = True
        logprobs_BT[b, start:length] = torch.tensor(t.completion.logprobs)
        values_BT[b, start:length] = torch.tensor(t.completion.values)
    batch = Batch(
        observations={"tokens": tokens_BT, "lengths": torch.tensor(lengths)},
        actions_BT=tokens_BT,
        mask_BT=mask_BT,
        logprobs_BT=logprobs_BT,
        values_BT=values_BT,
        rewards_BT=rewards_BT,
        ends_BT=ends_BT,
        bootstrap_BT=torch.zeros(shape),  # an answer that was cut off is terminal, with value 0
        trajectories=list(trajectories),
        version=min(t.completion.version for t in trajectories),
    )
    return to_device(batch, device)


def has_reward_variance(batch: Batch) -> Tensor:
    """[B] bool: whether the rewards in the row's group differ, so that comparing its answers says something.

    Rewards are those of whole answers, after shaping and before the KL penalty; rows that wrote nothing do not count.
    """
    assert batch.groups_B is not None
    acted_B = batch.mask_BT.any(1)
    rewards_B = torch.where(batch.mask_BT, batch.rewards_BT, 0.0).sum(1)
    differ_BB = (batch.groups_B[:, None] == batch.groups_B) & (rewards_B[:, None] != rewards_B)
    return (differ_BB & acted_B & acted_B[:, None]).any(1)

"""From trajectories to one padded batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.data.batches import padded
from surefoot.types import Batch, Trajectory


def text_batch(trajectories: Sequence[Trajectory], *, device: torch.device) -> Batch:
    """Right-padded [B, T] batch over all turns, up to the last token that the policy wrote, where rows end.

    The mask has the policy's tokens, by turns and never by comparing tokens with a pad id. A turn's reward
    goes on the policy's last token up to the turn's end. In each row the policy must have written a token,
    and one before any reward.
    """
    rows = [_columns(trajectory) for trajectory in trajectories]
    lengths_B = torch.tensor([len(tokens) for tokens, *_ in rows])
    tokens_BT, mask_BT, logprobs_BT, values_BT, rewards_BT = map(padded, zip(*rows, strict=True))
    batch = Batch(
        observations={"tokens": tokens_BT, "lengths": lengths_B},
        actions_BT=tokens_BT,
        mask_BT=mask_BT,
        logprobs_BT=logprobs_BT,
        values_BT=values_BT,
        rewards_BT=rewards_BT,
        ends_BT=torch.arange(tokens_BT.shape[1]) == lengths_B[:, None] - 1,
        bootstrap_BT=torch.zeros_like(rewards_BT),  # an episode that was cut off is terminal, with value 0
        truncated_B=torch.tensor([not t.stop_reason.ended_by_itself for t in trajectories]),
        trajectories=list(trajectories),
        version=min(turn.version for t in trajectories for turn in t.turns if turn.by_policy),
    )
    return batch.to(device)


def _columns(trajectory: Trajectory) -> tuple[list[Any], ...]:
    """Tokens, mask, log-probs, values and rewards of a trajectory, up to the policy's last token."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    end = 0
    for turn in trajectory.turns:
        count, nothing = len(turn.tokens), [0.0] * len(turn.tokens)
        if turn.by_policy and not count == len(turn.logprobs) == len(turn.values):
            raise ValueError(f"a policy's turn of {count} tokens needs as many logprobs and values")
        measured = (turn.logprobs, turn.values) if turn.by_policy else (nothing, nothing)
        more: tuple[Any, ...] = (turn.tokens, [turn.by_policy] * len(turn.tokens), *measured, nothing)
        for column, added in zip(columns, more, strict=True):
            column.extend(added)
        if turn.by_policy and turn.tokens:
            end = len(columns[0])
        if turn.reward:
            assert end, "a reward before the policy has written anything"
            columns[-1][end - 1] += turn.reward
    return tuple(column[:end] for column in columns)


def has_reward_variance(batch: Batch) -> Tensor:
    """[B] bool: whether the rewards in the row's group differ, so that comparing them says something.

    Rewards are whole episodes', after shaping and before the KL penalty; rows without an action don't count.
    """
    assert batch.groups_B is not None
    acted_B = batch.mask_BT.any(1)
    rewards_B = torch.where(batch.mask_BT, batch.rewards_BT, 0.0).sum(1)
    differ_BB = (batch.groups_B[:, None] == batch.groups_B) & (rewards_B[:, None] != rewards_B)
    return (differ_BB & acted_B & acted_B[:, None]).any(1)

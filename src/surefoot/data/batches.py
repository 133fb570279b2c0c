"""Rows of tokens -> one padded batch; and a batch -> minibatches and micro-batches."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from surefoot.types import Batch

Masked: TypeAlias = tuple[Sequence[int], Sequence[bool]]  # tokens, and on which of them the loss falls
Texts: TypeAlias = Sequence[Sequence[int]]


def padded(columns: Sequence[Sequence[Any]]) -> Tensor:
    """Columns of several lengths as one tensor [B, T], with 0 at the right."""
    return pad_sequence([torch.tensor(column) for column in columns], batch_first=True)


def demonstration_batch(rows: Sequence[Masked], *, device: torch.device, temperature: float = 1.0) -> Batch:
    """Right-padded [B, T] batch of (tokens, loss mask); it has no log-probs, values or rewards."""
    tokens_BT, mask_BT = (padded([row[side] for row in rows]) for side in (0, 1))
    observations = {"tokens": tokens_BT, "lengths": torch.tensor([len(tokens) for tokens, _ in rows])}
    return Batch(observations, mask_BT, tokens_BT, temperature=temperature).to(device)


def preference_batch(rows: Sequence[Texts], labels: Sequence[float] = (), *, device: torch.device) -> Batch:
    """Batch of rows of K tokenized texts, right-padded to [B, T, K]; the mask covers a row's longest."""
    lengths_BK = torch.tensor([[len(tokens) for tokens in texts] for texts in rows])
    tokens_BKT = padded([tokens for row in rows for tokens in row]).view(*lengths_BK.shape, -1)
    tokens_BTK = tokens_BKT.transpose(1, 2).contiguous()
    mask_BT = torch.arange(tokens_BTK.shape[1]) < lengths_BK.amax(1)[:, None]
    observations = {"tokens": tokens_BTK, "lengths": lengths_BK}
    return Batch(observations, mask_BT, labels_B=torch.tensor(labels, dtype=torch.float32)).to(device)


def texts_of(batch: Batch) -> Batch:
    """The texts of a batch of pairs, the sides of a row in turn, [2B, T]; the mask has their completions.

    A completion reaches from the observation `starts` [B, 2] to the text's end.
    """
    tokens_NT = batch.observations["tokens"].transpose(1, 2).flatten(0, 1)
    starts_N, lengths_N = batch.observations["starts"].flatten(), batch.observations["lengths"].flatten()
    steps_T = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
    mask_NT = (steps_T >= starts_N[:, None]) & (steps_T < lengths_N[:, None])
    return Batch({"tokens": tokens_NT, "lengths": lengths_N}, mask_NT, tokens_NT)


def minibatches(batch: Batch, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Batch, Tensor]]:
    """One shuffled pass: a batch and the indices [batch_size] of a minibatch's rows; the last may be smaller.

    Single steps are shuffled once and cut, which is cheaper than picking. The generator is a CPU one.
    """
    if batch_size >= len(batch):  # all of it: their order does not matter
        yield batch, torch.arange(len(batch))
        return
    order = torch.randperm(len(batch), generator=generator)
    if batch.mask_BT.shape[1] > 1:
        for rows in order.split(batch_size):
            yield batch, rows
        return
    shuffled = batch.rows(order)
    for start in range(0, len(batch), batch_size):
        piece = shuffled.rows(slice(start, start + batch_size))
        yield piece, torch.arange(len(piece))


def micro_batches(batch: Batch, rows: Tensor, token_budget: int) -> list[Tensor]:
    """Split `rows` into groups whose rows times longest row stay within `token_budget` (one row at least).

    Rows of like length are grouped, longest first, so that padding is small.
    """
    if len(rows) * batch.mask_BT.shape[1] <= token_budget:
        return [rows]
    steps_T = torch.arange(1, batch.mask_BT.shape[1] + 1, device=batch.mask_BT.device)
    lengths = (batch.mask_BT * steps_T).amax(1).clamp(min=1).tolist()  # up to a row's last masked step
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(rows.tolist(), key=lambda r: (-lengths[r], r)):
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return [torch.tensor(group) for group in groups]

"""Log-probs and values of a batch under policy and reference, before any update, without gradient."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from surefoot.core.kl import k1
from surefoot.data.batches import micro_batches, texts_of
from surefoot.policies.base import Policy
from surefoot.types import Batch

Logprobs: TypeAlias = Callable[[Batch], Tensor | None]  # of a batch's actions, [B, T] nats


@torch.no_grad()
def fill_logprobs(
    policy: Policy,
    batch: Batch,
    *,
    token_budget: int,
    exact_logprobs: bool,
    values: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Fill `reference_logprobs_BT`, and the old log-probs and values where the sampler's don't serve.

    They must come from the code that will compute the new ones, or the first ratio isn't 1. Log-probs that
    are the trainer's to rounding (`exact_logprobs`; bfloat16's are not) are kept, unless there are none
    (`needs_logprobs`). Where the sampler had no values alone, `values` gives them.
    """
    rescore = batch.needs_logprobs or not exact_logprobs
    if rescore:
        batch.behavior_logprobs_BT = None if batch.needs_logprobs else batch.logprobs_BT
        batch.logprobs_BT, batch.values_BT = batch.logprobs_BT.clone(), batch.values_BT.clone()
    for rows in micro_batches(batch, torch.arange(len(batch)), token_budget):
        part = batch.rows(rows)
        length = part.mask_BT.shape[1]
        if (reference := policy.reference_logprobs(part)) is not None:
            if batch.reference_logprobs_BT is None:
                batch.reference_logprobs_BT = torch.zeros_like(batch.logprobs_BT)
            batch.reference_logprobs_BT[rows, :length] = reference
        if rescore:
            view = policy.evaluate(part)
            batch.logprobs_BT[rows, :length] = view.logprobs_BT
            batch.values_BT[rows, :length] = view.values_BT
        elif values is not None:
            batch.values_BT[rows, :length] = values(part)
    batch.needs_logprobs = False


def pair_logprobs(logprobs: Logprobs, batch: Batch) -> Tensor:
    """Log-probs of a batch of pairs' completions, [B, 2] nats; `logprobs` gives those of their tokens.

    Summed without the first token, which is never a completion's: to the bit what TRL sums.
    """
    texts = texts_of(batch)
    found_NT = logprobs(texts)
    assert found_NT is not None
    return torch.where(texts.mask_BT, found_NT, 0.0)[:, 1:].sum(1).view(len(batch), 2)


def sequence_kl(batch: Batch) -> Tensor:
    """Each row's KL to the reference, [B] nats: k1 summed over its completion; 0 without a reference."""
    if batch.reference_logprobs_BT is None:
        return torch.zeros(len(batch), device=batch.mask_BT.device)
    return torch.where(batch.mask_BT, k1(batch.logprobs_BT, batch.reference_logprobs_BT), 0.0).sum(1)

"""From logits to a token and its log-prob, one independent stream of randomness per request."""

import torch
from torch import Tensor

from surefoot.types import SamplingParams

BLOCK = 256  # tokens of the vocabulary whose weights are summed before the search


def request_uniforms(seed: int, count: int) -> Tensor:
    """`count` float64 uniforms in [0, 1) that depend on `seed` alone: number t draws a request's token t."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(logits_BV: Tensor, uniforms_B: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniforms_B` (float64).

    Returns tokens [B] int64, their log-probs [B] float32 in nats under the distribution drawn from, and that
    distribution's entropies [B] in nats. Greedy (temperature 0) reports the undivided distribution's.
    """
    logits_BV = logits_BV.float()
    if params.temperature not in (0, 1):
        logits_BV = logits_BV / params.temperature
    if params.temperature > 0:
        logits_BV = _truncated(logits_BV, params)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BV = torch.exp(logits_BV - top_B1)
    tokens_B = logits_BV.argmax(-1) if params.temperature == 0 else _invert(weights_BV, uniforms_B)
    total_B = weights_BV.sum(-1)
    log_total_B = top_B1.squeeze(-1) + total_B.log()
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1) - log_total_B
    # H = log Σ exp(z) - E[z]; a truncated logit is -inf with weight 0 and adds nothing.
    finite_BV = logits_BV if params.top_k is None and params.top_p is None else logits_BV.clamp(min=-1e30)
    entropies_B = log_total_B - torch.linalg.vecdot(weights_BV, finite_BV) / total_B
    return tokens_B, logprobs_B, entropies_B


def _invert(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative weight passes `uniforms_B` of the total, [B].

    In float64, since float32 rounding would decide rare tokens of a large vocabulary; in two steps, first the
    block, then the token in it, since a float64 sum over the whole vocabulary costs as much as the model.
    """
    if weights_BV.device.type == "mps":  # it has no float64
        return _invert(weights_BV.cpu(), uniforms_B).to(weights_BV.device)
    uniforms_B = uniforms_B.to(weights_BV.device)
    rows, vocabulary = weights_BV.shape
    blocks = -(-vocabulary // BLOCK)
    padded = torch.nn.functional.pad(weights_BV, (0, blocks * BLOCK - vocabulary)).view(rows, blocks, BLOCK)
    block_cumulative = padded.sum(-1).to(torch.float64).cumsum(-1)
    wanted = (uniforms_B * block_cumulative[:, -1])[:, None]
    block = torch.searchsorted(block_cumulative, wanted, right=True).clamp(max=blocks - 1)
    before = torch.nn.functional.pad(block_cumulative, (1, 0)).gather(-1, block)
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    cumulative = inside.to(torch.float64).cumsum(-1)
    # The block's float32 sum and this float64 one differ by rounding: stay on a token that has weight.
    last_weighted = (BLOCK - 1) - (inside > 0).flip(-1).to(torch.int8).argmax(-1)
    within = torch.searchsorted(cumulative, wanted - before, right=True).squeeze(-1)
    # NaN weights would lead past the end; a token that exists, with log-prob NaN, lets the update skip it.
    return (block.squeeze(-1) * BLOCK + torch.minimum(within, last_weighted)).clamp(max=vocabulary - 1)


def _truncated(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    if params.top_k is not None and params.top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    if params.top_p is not None and params.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probs = torch.softmax(ordered, dim=-1)
        outside = probs.cumsum(-1) - probs >= params.top_p  # the token that crosses p stays
        logits_BV = logits_BV.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits_BV

"""Log-probs and entropies of completion tokens from hidden states, without ever holding [N, V] whole.

The vocabulary layer is a fifth of a small model's arithmetic and most of its memory traffic. Two paths, one
result: `_FrozenHead` when only the hidden states need a gradient (adapters), plain autograd with
recomputation otherwise.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Tokens at once: 64 x 49,152 float32 logits are 12 MB and stay in the last-level cache between passes.
CHUNK = 64


def action_logprobs(
    hidden_ND: Tensor,
    actions_N: Tensor,
    *,
    head: nn.Module,
    cap: float | None,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `actions_N` and entropies, [N] float32 nats, under softmax(logits(hidden) / temperature).

    Entropies carry a gradient only with `entropy_gradient`.
    """
    is_linear = type(head) is nn.Linear and head.bias is None
    if is_linear and not head.weight.requires_grad and not entropy_gradient and cap is None:
        logprobs_N, entropies_N = _FrozenHead.apply(hidden_ND, head.weight, actions_N, temperature)
        return logprobs_N, entropies_N

    def chunk(hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_NV = torch.log_softmax(logits(hidden, head, cap) / temperature, dim=-1)
        entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return logprobs_NV.gather(-1, actions[:, None]).squeeze(-1), entropy

    # With a gradient, computed again in the backward pass rather than kept.
    run = functools.partial(checkpoint, chunk, use_reentrant=False) if torch.is_grad_enabled() else chunk
    chunks = map(run, hidden_ND.split(8 * CHUNK), actions_N.split(8 * CHUNK))
    logprobs_N, entropies_N = map(torch.cat, zip(*chunks, strict=True))
    return logprobs_N, entropies_N if entropy_gradient else entropies_N.detach()


def logits(hidden: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    """Float32 logits; with `cap` c, c · tanh(logits / c), as Gemma 2 has them."""
    plain: Tensor = head(hidden).float()
    return plain if cap is None else torch.tanh(plain / cap) * cap


class _FrozenHead(torch.autograd.Function):
    """Log-prob and entropy of a linear head that is not trained.

    ∂ log p(y) / ∂ h = (W_y - Σ_v p_v W_v) / temperature needs only what the forward pass has at hand: it is
    computed there, and [N, D] is kept instead of [N, V].
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, actions_N: Tensor, temperature: float) -> Any:
        logprobs, entropies, slopes = [], [], []
        for hidden, actions in zip(hidden_ND.split(CHUNK), actions_N.split(CHUNK), strict=True):
            scaled = (hidden.to(weight_VD.dtype) @ weight_VD.T).float()
            if temperature != 1.0:
                scaled /= temperature
            top = scaled.amax(-1, keepdim=True)
            picked = scaled.gather(-1, actions[:, None])
            probs = torch.exp(scaled - top)
            total = probs.sum(-1, keepdim=True)
            log_total = top + total.log()
            probs /= total
            logprobs.append((picked - log_total).squeeze(-1))
            entropies.append(log_total.squeeze(-1) - torch.linalg.vecdot(probs, scaled))
            if ctx.needs_input_grad[0]:
                expected = probs.to(weight_VD.dtype) @ weight_VD
                slopes.append((weight_VD[actions] - expected) / temperature)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        ctx.hidden_dtype = hidden_ND.dtype
        entropies_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_N)
        return torch.cat(logprobs), entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slopes_ND,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes_ND).to(ctx.hidden_dtype), None, None, None

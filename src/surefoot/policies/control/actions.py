"""What a policy does with its last features: one head per kind of action space.

A head holds the last linear layer and the distribution. `noise` draws the randomness of a whole rollout,
entry t for step t, so that sampling is a few cheap operations and follows from one seed. `sample` turns
latent features [N, F] and one entry of the noise into an action for each row, or, without noise, into the
greedy one; a mask [N, A] (bool) names the legal actions. `evaluate_actions` gives log-prob and entropy [N],
float32, in nats; over several action dimensions they add up.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from surefoot.errors import InputError

LOG_2PI = math.log(2.0 * math.pi)
Mask: TypeAlias = Tensor | None
Evaluated: TypeAlias = tuple[Tensor, Tensor]


class ActionHead(nn.Module):
    """The last linear layer; a kind of head says how noise is drawn, and what outputs mean."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(features, outputs)

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Any:
        """Noise for the outputs, [steps, envs, outputs]."""
        return self._draw((steps, envs, self.linear.out_features), generator)

    def sample(self, latent_NF: Tensor, noise: Tensor | None, mask: Mask) -> Tensor:
        """Actions of N rows; continuous ones are not clipped to the space."""
        outputs = self.linear(latent_NF)
        if noise is not None:
            outputs = outputs + self._scaled(noise, latent_NF)
        return self._choose(_masked(outputs, mask))

    def evaluate_actions(self, latent_NF: Tensor, actions: Tensor, mask: Mask) -> Evaluated:
        """Log-prob (or log-density) and entropy [N]."""
        return self._evaluate(_masked(self.linear(latent_NF).float(), mask), actions, latent_NF)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)

    def _scaled(self, noise: Tensor, latent_NF: Tensor) -> Tensor:
        return noise

    def _choose(self, outputs: Tensor) -> Tensor:
        return outputs

    def _evaluate(self, outputs: Tensor, actions: Tensor, latent_NF: Tensor) -> Evaluated:
        raise NotImplementedError


class CategoricalHead(ActionHead):
    """One of `outputs` actions; [N] int64."""

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # Gumbel noise: the largest logit plus noise is a draw from the softmax.
        return -torch.empty(shape).exponential_(generator=generator).log()

    def _choose(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def _evaluate(self, outputs: Tensor, actions: Tensor, latent_NF: Tensor) -> Evaluated:
        logprobs = torch.log_softmax(outputs, -1)
        # An illegal action has probability 0; 0 · log 0 is 0, and its log-prob is finite.
        return logprobs.gather(-1, actions[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


class MultiCategoricalHead(CategoricalHead):
    """Several independent choices of `sizes` actions; [N, len(sizes)] int64."""

    def __init__(self, features: int, sizes: list[int]):
        super().__init__(features, sum(sizes))
        self.sizes = sizes

    def _choose(self, outputs: Tensor) -> Tensor:
        return torch.stack([*map(super()._choose, outputs.split(self.sizes, -1))], -1)

    def _evaluate(self, outputs: Tensor, actions: Tensor, latent_NF: Tensor) -> Evaluated:
        evaluate, choices = (
            super()._evaluate,
            zip(outputs.split(self.sizes, -1), actions.unbind(-1), strict=True),
        )
        logprobs, entropies = zip(*(evaluate(*choice, latent_NF) for choice in choices), strict=True)
        return torch.stack(logprobs).sum(0), torch.stack(entropies).sum(0)


class BernoulliHead(ActionHead):
    """Independent switches; [N, outputs] int64 of 0 and 1. There are no masks for them."""

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # Logistic noise: a logit plus noise above 0 is a draw from the Bernoulli.
        return torch.logit(torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7))

    def _choose(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).long()

    def _evaluate(self, outputs: Tensor, actions: Tensor, latent_NF: Tensor) -> Evaluated:
        on, off = functional.logsigmoid(outputs), functional.logsigmoid(-outputs)
        logprobs = torch.where(actions > 0, on, off)
        return logprobs.sum(-1), -(on.exp() * on + off.exp() * off).sum(-1)


class GaussianHead(ActionHead):
    """Continuous actions [N, outputs] float32 with a standard deviation that does not depend on the state."""

    def __init__(self, features: int, outputs: int, *, log_std: float = 0.0):
        super().__init__(features, outputs)
        self.log_std = nn.Parameter(torch.full((outputs,), log_std))

    def _scaled(self, noise: Tensor, latent_NF: Tensor) -> Tensor:
        return self.log_std.exp() * noise

    def _log_std(self, latent_NF: Tensor) -> Tensor:
        return self.log_std

    def _evaluate(self, outputs: Tensor, actions: Tensor, latent_NF: Tensor) -> Evaluated:
        log_std = self._log_std(latent_NF)
        squares = ((actions - outputs) * torch.exp(-log_std)) ** 2
        logprobs = (-0.5 * squares - log_std - 0.5 * LOG_2PI).sum(-1)
        return logprobs, (0.5 + 0.5 * LOG_2PI + log_std).sum(-1).expand_as(logprobs)


class StateDependentHead(GaussianHead):
    """Continuous actions [N, outputs] whose noise is a function of the features, held for some steps.

    ε(s) = θᵀ·features with θ ~ N(0, σ²) (Raffin, Kober & Stulp 2021, arXiv:2005.05719, eq. 4), so the density
    of an action is N(mean, features² · σ²). The features are detached there: the noise does not shape them.
    """

    def __init__(self, features: int, outputs: int, *, log_std: float = 0.0, sample_freq: int = -1):
        super().__init__(features, outputs)
        self.log_std = nn.Parameter(torch.full((features, outputs), log_std))
        self.sample_freq = sample_freq

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> list[Tensor]:
        """Standard normal θ/σ [envs, features, outputs] of each step, new every `sample_freq` steps."""
        every, shape = steps if self.sample_freq < 1 else self.sample_freq, (envs, *self.log_std.shape)
        drawn = [self._draw(shape, generator) for _ in range(0, steps, every)]
        return [drawn[t // every] for t in range(steps)]

    def _scaled(self, noise: Tensor, latent_NF: Tensor) -> Tensor:
        return torch.bmm(latent_NF[:, None], self.log_std.exp() * noise).squeeze(1)

    def _log_std(self, latent_NF: Tensor) -> Tensor:
        variance = latent_NF.detach().float() ** 2 @ self.log_std.exp() ** 2
        return 0.5 * torch.log(variance + 1e-6)


def action_head(
    space: Any, features: int, *, log_std: float = 0.0, use_sde: bool = False, sde_sample_freq: int = -1
) -> ActionHead:
    """The head for a Gymnasium action space. Raises InputError for one that has none.

    Only the space's class name and sizes are read: policies know nothing else of Gymnasium.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return CategoricalHead(features, int(space.n))
    if len(space.shape or ()) == 1:
        if kind == "MultiDiscrete":
            return MultiCategoricalHead(features, [int(n) for n in space.nvec])
        if kind == "MultiBinary":
            return BernoulliHead(features, space.shape[0])
        if kind == "Box" and use_sde:
            return StateDependentHead(features, space.shape[0], log_std=log_std, sample_freq=sde_sample_freq)
        if kind == "Box":
            return GaussianHead(features, space.shape[0], log_std=log_std)
    raise InputError(
        f"env: the action space {space} is not supported; Discrete, MultiDiscrete, MultiBinary and Box of "
        "one dimension are (gymnasium.wrappers.FlattenAction or your own wrapper can make it one)"
    )


def _masked(logits: Tensor, mask: Mask) -> Tensor:
    return logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)

"""What a policy does with its last features: one head per kind of action space.

A head holds the last linear layer and the distribution. `noise` draws the randomness of a whole rollout,
entry t for step t, so that sampling is a few cheap operations and follows from one seed. `sample` turns
latent features [N, F] and one entry of the noise into an action for each row, or, without noise, into the
greedy one; a mask [N, A] (bool) names the legal actions. `evaluate_actions` gives log-prob and entropy [N],
float32, in nats; over several action dimensions they add up.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from surefoot.config import NetworkConfig
from surefoot.errors import InputError

LOG_2PI = math.log(2.0 * math.pi)
Mask: TypeAlias = Tensor | None
Evaluated: TypeAlias = tuple[Tensor, Tensor]


class CategoricalHead(nn.Module):
    """One choice, [N] int64, or where the space has several, independent of each other, [N, len(sizes)]."""

    def __init__(self, features: int, sizes: list[int], *, is_one: bool):
        super().__init__()
        self.sizes, self.is_one = sizes, is_one
        self.linear = nn.Linear(features, sum(sizes))

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise [steps, envs, sum(sizes)]: the largest logit plus noise is a draw from the softmax."""
        return -torch.empty((steps, envs, sum(self.sizes))).exponential_(generator=generator).log()

    def sample(self, latent_NF: Tensor, noise: Tensor | None, mask: Mask) -> Tensor:
        """Actions [N], or [N, len(sizes)]."""
        logits = _masked(_noisy(self.linear(latent_NF), noise), mask)
        if self.is_one:
            return logits.argmax(-1)
        return torch.stack([part.argmax(-1) for part in logits.split(self.sizes, -1)], -1)

    def evaluate_actions(self, latent_NF: Tensor, actions: Tensor, mask: Mask) -> Evaluated:
        """Log-prob and entropy [N], summed over the choices."""
        logits = _masked(self.linear(latent_NF).float(), mask)
        if self.is_one:
            return _categorical(logits, actions)
        parts = map(_categorical, logits.split(self.sizes, -1), actions.unbind(-1))
        logprobs, entropies = zip(*parts, strict=True)
        return torch.stack(logprobs).sum(0), torch.stack(entropies).sum(0)


class BernoulliHead(nn.Module):
    """Independent switches; [N, n] int64 of 0 and 1. A mask is not defined for them."""

    def __init__(self, features: int, n: int):
        super().__init__()
        self.linear = nn.Linear(features, n)

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Tensor:
        """Logistic noise [steps, envs, n]: a logit plus noise above 0 is a draw from the Bernoulli."""
        uniform = torch.rand((steps, envs, self.linear.out_features), generator=generator)
        return torch.logit(uniform.clamp(1e-7, 1 - 1e-7))

    def sample(self, latent_NF: Tensor, noise: Tensor | None, mask: Mask) -> Tensor:
        """Actions [N, n]."""
        return (_noisy(self.linear(latent_NF), noise) > 0).long()

    def evaluate_actions(self, latent_NF: Tensor, actions: Tensor, mask: Mask) -> Evaluated:
        """Log-prob and entropy [N], summed over the switches."""
        logits = self.linear(latent_NF).float()
        on, off = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        logprobs = torch.where(actions > 0, on, off)
        return logprobs.sum(-1), -(on.exp() * on + off.exp() * off).sum(-1)


class GaussianHead(nn.Module):
    """Continuous actions [N, n] float32 with a standard deviation that does not depend on the state."""

    def __init__(self, features: int, n: int, config: NetworkConfig):
        super().__init__()
        self.linear = nn.Linear(features, n)
        self.log_std = nn.Parameter(torch.full((n,), config.log_std_init))

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise [steps, envs, n]."""
        return torch.randn((steps, envs, self.linear.out_features), generator=generator)

    def sample(self, latent_NF: Tensor, noise: Tensor | None, mask: Mask) -> Tensor:
        """Actions [N, n], not clipped to the space."""
        return _noisy(self.linear(latent_NF), None if noise is None else self.log_std.exp() * noise)

    def evaluate_actions(self, latent_NF: Tensor, actions: Tensor, mask: Mask) -> Evaluated:
        """Log-density and differential entropy [N]."""
        return _gaussian(self.linear(latent_NF).float(), self.log_std, actions)


class StateDependentHead(nn.Module):
    """Continuous actions [N, n] whose noise is a function of the features, held for some steps.

    ε(s) = θᵀ·features with θ ~ N(0, σ²) (Raffin, Kober & Stulp 2021, arXiv:2005.05719, eq. 4), so the density
    of an action is N(mean, features² · σ²). The features are detached there: the noise does not shape them.
    """

    def __init__(self, features: int, n: int, config: NetworkConfig):
        super().__init__()
        self.linear = nn.Linear(features, n)
        self.log_std = nn.Parameter(torch.full((features, n), config.log_std_init))
        self.sample_freq = config.sde_sample_freq

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> list[Tensor]:
        """Standard normal θ/σ [envs, features, n] for each step, a new one every `sample_freq` steps."""
        every, shape = steps if self.sample_freq < 1 else self.sample_freq, (envs, *self.log_std.shape)
        drawn = [torch.randn(shape, generator=generator) for _ in range(0, steps, every)]
        return [drawn[t // every] for t in range(steps)]

    def sample(self, latent_NF: Tensor, noise: Tensor | None, mask: Mask) -> Tensor:
        """Actions [N, n], not clipped to the space."""
        if noise is not None:
            noise = torch.bmm(latent_NF[:, None], self.log_std.exp() * noise).squeeze(1)
        return _noisy(self.linear(latent_NF), noise)

    def evaluate_actions(self, latent_NF: Tensor, actions: Tensor, mask: Mask) -> Evaluated:
        """Log-density and differential entropy [N]."""
        variance = latent_NF.detach().float() ** 2 @ self.log_std.exp() ** 2
        return _gaussian(self.linear(latent_NF).float(), 0.5 * torch.log(variance + 1e-6), actions)


def action_head(space: Any, features: int, config: NetworkConfig) -> Any:
    """The head for a Gymnasium action space. Raises InputError for one that has none.

    Only the space's class name and sizes are read: policies know nothing else of Gymnasium.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return CategoricalHead(features, [int(space.n)], is_one=True)
    is_flat = len(space.shape or ()) == 1
    if kind == "MultiDiscrete" and is_flat:
        return CategoricalHead(features, [int(n) for n in space.nvec], is_one=False)
    if kind == "MultiBinary" and is_flat:
        return BernoulliHead(features, space.shape[0])
    if kind == "Box" and is_flat:
        return (StateDependentHead if config.use_sde else GaussianHead)(features, space.shape[0], config)
    ours = "Discrete, MultiDiscrete, MultiBinary and Box of one dimension are"
    how = "a gymnasium.ActionWrapper of yours can make it one, by reshape"
    raise InputError(f"env: the action space {space} is not supported; {ours} ({how})")


def _noisy(outputs: Tensor, noise: Tensor | None) -> Tensor:
    """Float32 whatever the outputs were computed in."""
    return outputs.float() if noise is None else outputs.float() + noise.float()


def _masked(logits: Tensor, mask: Mask) -> Tensor:
    return logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def _categorical(logits: Tensor, actions: Tensor) -> Evaluated:
    logprobs = torch.log_softmax(logits, -1)
    # An illegal action has probability 0; 0 · log 0 is 0, and its log-prob is finite.
    return logprobs.gather(-1, actions[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def _gaussian(mean: Tensor, log_std: Tensor, actions: Tensor) -> Evaluated:
    squares = ((actions - mean) * torch.exp(-log_std)) ** 2
    logprobs = (-0.5 * squares - log_std - 0.5 * LOG_2PI).sum(-1)
    return logprobs, (0.5 + 0.5 * LOG_2PI + log_std).sum(-1).expand_as(logprobs)

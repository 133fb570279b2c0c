"""The gradient of two small tanh towers written out in NumPy: what autograd would find, in a third of the time.

A network of two layers of 64 spends its update on starting operations, not on numbers, and NumPy starts them faster. It is
used where `supports` says so: float32 on a CPU, plain observations, tanh towers, one choice or Gaussians.
Everything else goes through autograd, which is also its slow twin in the tests. The loss is the same one (`core/losses.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.core.losses import LossSettings, LossStats, loss_and_gradients
from surefoot.policies.actions import LOG_2PI, CategoricalHead, GaussianHead, StateDependentHead
from surefoot.policies.networks import Extractor, Tower
from surefoot.types import Batch

if TYPE_CHECKING:
    from surefoot.policies.control import ControlPolicy

Array = NDArray[numpy.float32]


def supports(policy: ControlPolicy) -> bool:
    """Whether this policy's gradient is known here."""
    layers, extractor = policy.layers, policy.extractor
    return (
        policy.device.type == "cpu"
        and policy.dtype == torch.float32
        and policy.memory is None
        and isinstance(extractor, Extractor)
        and list(extractor.parts.values()) == [None]
        and not policy.has_masks
        and not layers.is_shared
        and all(isinstance(tower, Tower) and tower.is_tanh for tower in (layers.policy, layers.value))
        and isinstance(policy.head, (CategoricalHead, GaussianHead, StateDependentHead))
    )


class ClosedForm:
    """The parameters of a policy as NumPy sees them, for one update. Call it for the gradient of one minibatch.

    The views are of the policy's own memory: an optimiser that changes the weights in place changes these.
    """

    def __init__(self, policy: ControlPolicy):
        layers = policy.layers
        self.actor = [_Linear(linear) for linear in (*list(layers.policy)[::2], policy.head.linear)]
        self.critic = [_Linear(linear) for linear in (*list(layers.value)[::2], policy.value_head)]
        self.is_discrete = isinstance(policy.head, CategoricalHead)
        self.log_std = None if self.is_discrete else _Parameter(policy.head.log_std)
        self.scorer: Any = _Gaussian if isinstance(policy.head, GaussianHead) else _StateDependent

    def __call__(self, batch: Batch, advantages_BT: Tensor, *, denominator: float, settings: LossSettings) -> LossStats:
        """Add the gradient of the PPO loss on `batch` ([N, 1] rows) to the parameters' `grad`; its statistics."""
        assert batch.returns_BT is not None
        values = next(iter(batch.observations.values()))
        observations = values.reshape(len(values), -1).float().numpy()
        actor, critic = _forward(self.actor, observations), _forward(self.critic, observations)
        actions = batch.actions_BT[:, 0].numpy()
        if self.is_discrete:
            scored: Any = _Categorical(actor[-1], actions)
        else:
            scored = self.scorer(actor[-1], actions, self.log_std, actor[-2])
        _, stats, gradients = loss_and_gradients(
            (_column(scored.logprobs), torch.from_numpy(critic[-1]), _column(scored.entropies)),
            (batch.logprobs_BT, batch.values_BT),
            (advantages_BT, batch.returns_BT),
            mask_BT=batch.mask_BT,
            denominator=denominator,
            settings=settings,
        )
        by_logprob, by_value, by_entropy = gradients[0].numpy(), gradients[1].numpy(), gradients[2]
        _backward(self.critic, critic, by_value)
        _backward(self.actor, actor, scored.backward(by_logprob, None if by_entropy is None else by_entropy.numpy()))
        return stats


class _Parameter:
    """A parameter and its memory as an array."""

    def __init__(self, parameter: Any):
        self.parameter, self.array = parameter, parameter.detach().numpy()

    def add(self, gradient: Any) -> None:
        """Add to the parameter's gradient."""
        found = torch.from_numpy(gradient)
        self.parameter.grad = found if self.parameter.grad is None else self.parameter.grad + found


class _Linear:
    """A linear layer's weight and bias."""

    def __init__(self, linear: Any):
        self.weight, self.bias = _Parameter(linear.weight), _Parameter(linear.bias)


class _Categorical:
    """log softmax of logits [N, A] at the actions [N], and its derivative."""

    def __init__(self, logits: Array, actions: NDArray[numpy.int64]):
        shifted = logits - logits.max(1, keepdims=True)
        weights = numpy.exp(shifted)
        total = weights.sum(1, keepdims=True)
        self.logs, self.probabilities = shifted - numpy.log(total), weights / total
        self.taken = numpy.arange(len(actions)), actions
        self.logprobs = self.logs[self.taken]
        self.entropies = -(self.probabilities * self.logs).sum(1)

    def backward(self, by_logprob: Array, by_entropy: Array | None) -> Array:
        """[N, A]: ∂ log p(a) = 1[a] - p,  ∂ H = -p (log p + H)."""
        gradient: Array = -by_logprob * self.probabilities
        gradient[self.taken] += by_logprob[:, 0]
        if by_entropy is not None:
            gradient -= by_entropy * self.probabilities * (self.logs + self.entropies[:, None])
        return gradient


class _Gaussian:
    """log density of independent Gaussians with means [N, D] at the actions [N, D], and its derivative."""

    def __init__(self, means: Array, actions: Array, log_std_parameter: _Parameter, latent: Array):
        self.parameter, log_std = log_std_parameter, log_std_parameter.array
        self.inverse = numpy.exp(-log_std)
        self.standard = (actions - means) * self.inverse
        constant = (log_std + 0.5 * LOG_2PI).sum()
        self.logprobs = -0.5 * (self.standard**2).sum(1) - constant
        self.entropies = numpy.full(len(means), constant + 0.5 * len(log_std), dtype=numpy.float32)

    def backward(self, by_logprob: Array, by_entropy: Array | None) -> Array:
        """[N, D]: ∂ by the mean is z/σ; the deviation's own gradient, z² - 1 and 1 for the entropy, is added to it."""
        by_log_std = (by_logprob * (self.standard**2 - 1.0)).sum(0)
        if by_entropy is not None:
            by_log_std = by_log_std + by_entropy.sum()
        self.parameter.add(numpy.asarray(by_log_std, dtype=numpy.float32))
        gradient: Array = by_logprob * self.standard * self.inverse
        return gradient


class _StateDependent:
    """The same with a variance of its own for each state, features² [N, F] · σ² [F, D]; no gradient by those features."""

    def __init__(self, means: Array, actions: Array, log_std_parameter: _Parameter, latent: Array):
        self.parameter, self.squares = log_std_parameter, latent * latent
        self.sigma_squared = numpy.exp(2.0 * log_std_parameter.array)
        self.variance = self.squares @ self.sigma_squared + 1e-6
        self.off = actions - means
        logs = 0.5 * (numpy.log(self.variance) + LOG_2PI)
        self.logprobs = (-0.5 * self.off**2 / self.variance - logs).sum(1)
        self.entropies = (logs + 0.5).sum(1)

    def backward(self, by_logprob: Array, by_entropy: Array | None) -> Array:
        """[N, D]: ∂ by the mean is (a - μ)/v; by the variance ½ ((a - μ)²/v - 1)/v, and ½/v for the entropy."""
        by_variance = by_logprob * (self.off**2 / self.variance - 1.0)
        if by_entropy is not None:
            by_variance = by_variance + by_entropy
        by_variance *= 0.5 / self.variance
        self.parameter.add(2.0 * self.sigma_squared * (self.squares.T @ by_variance))
        gradient: Array = by_logprob * self.off / self.variance
        return gradient


def _forward(layers: list[_Linear], values: Array) -> list[Array]:
    """The input, every hidden layer's tanh, and the last layer's output."""
    hidden = [values]
    for layer in layers:
        after = hidden[-1] @ layer.weight.array.T
        after += layer.bias.array
        hidden.append(after if layer is layers[-1] else numpy.tanh(after, out=after))
    return hidden


def _backward(layers: list[_Linear], hidden: list[Array], gradient: Array) -> None:
    """Add the gradients of all layers, given that of the last one's output [N, A]."""
    for i in reversed(range(len(layers))):
        layers[i].weight.add(gradient.T @ hidden[i])
        layers[i].bias.add(gradient.sum(0))
        if i:
            gradient = (gradient @ layers[i].weight.array) * (1.0 - hidden[i] * hidden[i])


def _column(values_N: Array) -> Tensor:
    return torch.from_numpy(values_N)[:, None]

"""The PPO gradient of two small tanh towers written out in NumPy: autograd's, without its bookkeeping.

A network of two layers of 64 spends its update on starting operations, not on numbers, and NumPy starts them
faster; and its dozen small tensors lie end to end while an update lasts, so that norm, clipping and Adam are
one operation each. `build` hands it to the objective where `supports` says so: float32 on a CPU, no
parameters before the towers, tanh, one choice or Gaussians. Everything else goes through autograd, which is
also its slow twin in the tests. The loss is a twin of `core/losses.py:ppo_loss`, with its derivative.
"""

import contextlib
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surefoot.core.kl import MAX_LOG_RATIO
from surefoot.core.losses import LossSettings, PPOStats
from surefoot.policies.control.actions import LOG_2PI, CategoricalHead, GaussianHead, StateDependentHead
from surefoot.policies.control.networks import Extractor, Tower
from surefoot.policies.control.policy import ControlPolicy
from surefoot.types import ACTION_MASK, Batch

Array = NDArray[numpy.float32]
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's Adam calls them


def accelerator(policy: Any) -> "FastMLP | None":
    """The gradient written out, for a policy that it is written out for."""
    return FastMLP(policy) if supports(policy) else None


def supports(policy: Any) -> bool:
    """Whether this policy's gradient is known here: that of a `ControlPolicy` and of no subclass."""
    if type(policy) is not ControlPolicy:
        return False
    layers, extractor, head = policy.layers, policy.extractor, policy.head
    return (
        policy.device.type == "cpu"
        and policy.dtype == torch.float32
        and policy.lstm is None
        and isinstance(extractor, Extractor)
        and not list(extractor.parameters())
        and not layers.is_shared
        and all(isinstance(tower, Tower) and tower.is_tanh for tower in (layers.policy, layers.value))
        and type(head) in (CategoricalHead, GaussianHead, StateDependentHead)
        and getattr(head, "is_one", True)
        and all(parameter.requires_grad for parameter in policy.parameters())
    )


class FastMLP:
    """A policy's weights on one vector, and a minibatch's gradient: an `Accelerator` (`train/objective.py`).

    `lent` moves weights and Adam's moments in, and out again at the end: else the policy knows none of this.
    """

    def __init__(self, policy: Any):
        self.extractor: Any = policy.extractor
        self.parameters = [parameter for _, parameter in policy.named_parameters_to_train()]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.weights = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.gradient_N = torch.zeros_like(self.weights)
        self.optimizer = torch.optim.Adam([self.weights], fused=True)
        both = (self.weights.detach().split(self.sizes), self.gradient_N.split(self.sizes))
        slices: dict[Any, _Parameter] = {
            own: _Parameter(values.view_as(own).numpy(), gradient.view_as(own).numpy())
            for own, values, gradient in zip(self.parameters, *both, strict=True)
        }
        layers, head = policy.layers, policy.head
        self.actor, self.critic = (
            _Network([(slices[linear.weight], slices[linear.bias]) for linear in (*[*tower][::2], last)])
            for tower, last in ((layers.policy, head.linear), (layers.value, policy.value_head))
        )
        self.log_std = None if isinstance(head, CategoricalHead) else slices[head.log_std]
        self.head: Any = _StateDependent if isinstance(head, StateDependentHead) else _Gaussian

    @contextlib.contextmanager
    def lent(self, optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
        """For one update: an Adam on the vector that goes on where `optimizer` is, and hands back."""
        self._copy_in(optimizer)
        try:
            yield self.optimizer
        finally:
            self._copy_out(optimizer)

    @torch.no_grad()
    def _copy_in(self, optimizer: torch.optim.Optimizer) -> None:
        self.weights.copy_(torch.cat([parameter.flatten() for parameter in self.parameters]))
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        self.optimizer.param_groups[0].update(settings)
        self.optimizer.state.clear()
        states = [optimizer.state[parameter] for parameter in self.parameters if parameter in optimizer.state]
        if states:
            moments = {name: torch.cat([state[name].flatten() for state in states]) for name in MOMENTS}
            self.optimizer.state[self.weights] = {"step": states[0]["step"].clone(), **moments}

    @torch.no_grad()
    def _copy_out(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, values in zip(self.parameters, self.weights.split(self.sizes), strict=True):
            parameter.copy_(values.view_as(parameter))
        if state := self.optimizer.state.get(self.weights):
            for name in MOMENTS:
                for parameter, part in zip(self.parameters, state[name].split(self.sizes), strict=True):
                    optimizer.state[parameter][name] = part.view_as(parameter).clone()
                    optimizer.state[parameter]["step"] = state["step"].clone()

    def gradient(self, batch: Batch, settings: LossSettings, normalize: bool, token_budget: int) -> PPOStats:
        """Add the PPO loss's gradient on all of `batch` ([N, 1]), over its steps, to the vector's."""
        if self.weights.grad is None:
            self.gradient_N.zero_()
            self.weights.grad = self.gradient_N
        advantages_BT, mask_BT = batch.advantages_BT.numpy(), batch.mask_BT.numpy()
        steps = int(mask_BT.sum())
        if normalize and steps > 1:
            advantages_BT = _whitened(advantages_BT, mask_BT)
        pieces = [slice(i, i + token_budget) for i in range(0, len(batch), token_budget)]
        parts = [batch] if len(pieces) == 1 else [batch.rows(piece) for piece in pieces]
        found = zip(parts, (advantages_BT[piece] for piece in pieces), strict=True)
        return functools.reduce(operator.add, (self._add(*part, max(steps, 1), settings) for part in found))

    def _add(self, batch: Batch, advantages_BT: Array, denominator: int, settings: LossSettings) -> PPOStats:
        assert batch.returns_BT is not None
        features = self._features(batch.observations)
        outputs, values = self.actor.forward(features), self.critic.forward(features)
        actions = batch.actions_BT[:, 0].numpy()
        if self.log_std is None:
            mask = batch.observations.get(ACTION_MASK)
            head: Any = _Categorical(outputs, actions, None if mask is None else mask[:, 0].numpy())
        else:
            head = self.head(outputs, actions, self.log_std, self.actor.hidden[-1])
        new = (head.logprobs[:, None], values, head.entropies[:, None])
        old = (batch.logprobs_BT.numpy(), batch.values_BT.numpy(), advantages_BT, batch.returns_BT.numpy())
        found = loss_gradient(new, old, batch.mask_BT.numpy(), 1.0 / denominator, settings)
        stats, by_logprob, by_value, by_entropy = found
        self.critic.backward(by_value)
        self.actor.backward(head.backward(by_logprob, by_entropy))
        return stats

    def _features(self, observations: dict[str, Tensor]) -> Array:
        name, *others = self.extractor.parts
        if not others and self.extractor.parts[name] is None:  # numbers as they are
            values = observations[name]
            return values.reshape(len(values), -1).float().numpy()
        flat = {name: values.flatten(0, 1) for name, values in observations.items()}
        features: Array = self.extractor(flat).numpy()
        return features


def loss_gradient(
    new: tuple[Array, Array, Array],
    old: tuple[Array, Array, Array, Array],
    mask: NDArray[numpy.bool_],
    scale: float,
    settings: LossSettings,
) -> tuple[PPOStats, Array, Array, Array | None]:
    """The sums of `ppo_loss`, and its derivatives by log-probs, values and (with `ent_coef`) entropies.

    `new` are these three, `old` log-probs, values, advantages and returns: [N, 1]. What is masked goes last.
    """
    (logprobs, values, entropies), (old_logprobs, old_values, advantages, returns) = new, old
    log_ratio = logprobs - old_logprobs
    bounded = numpy.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = numpy.exp(bounded)
    within = numpy.clip(ratio, *settings.bounds)
    unclipped, clipped = -advantages * ratio, -advantages * within
    # d/d log π of -A r is -A r itself, where that branch counts.
    policy, by_logprob = numpy.maximum(unclipped, clipped), numpy.where(unclipped >= clipped, unclipped, 0.0)
    if settings.dual_clip is not None:
        bound = -settings.dual_clip * advantages
        is_past = (advantages < 0) & (policy > bound)
        policy, by_logprob = numpy.where(is_past, bound, policy), numpy.where(is_past, 0.0, by_logprob)
    by_value = values - returns
    squares, moved = by_value * by_value, numpy.zeros_like(values)
    if settings.clip_range_vf is not None:
        near = numpy.clip(values, old_values - settings.clip_range_vf, old_values + settings.clip_range_vf)
        clipped_squares, moved = (near - returns) ** 2, near != values
        by_value = numpy.where(squares >= clipped_squares, by_value, 0.0)
        squares = numpy.maximum(squares, clipped_squares)
    k3 = numpy.expm1(bounded) - bounded
    terms = (policy, 0.5 * squares, entropies, ratio, k3, ratio != within, moved, mask)
    # One sum for all of them: a small network spends more time on starting operations than on numbers.
    masked = numpy.where(mask, numpy.stack(terms), 0.0)
    return (
        PPOStats(*[*masked.sum((1, 2)), masked[3].max()]),
        numpy.where(mask & (bounded == log_ratio), by_logprob * scale, 0.0),
        numpy.where(mask, by_value * (settings.vf_coef * scale), 0.0),
        mask * (-settings.ent_coef * scale) if settings.ent_coef else None,
    )


def _whitened(values: Array, mask: NDArray[numpy.bool_]) -> Array:
    """`core/masked.py:whiten` of arrays."""
    count = max(mask.sum(), 1)
    centered = numpy.where(mask, values - numpy.where(mask, values, 0.0).sum() / count, 0.0)
    centered = numpy.where(mask, centered - centered.sum() / count, 0.0)
    whitened: Array = centered / numpy.sqrt((centered * centered).sum() / count + 1e-8)
    return whitened


@dataclass
class _Parameter:
    """A parameter's part of the vector, and its gradient's."""

    array: Array
    gradient: Array


class _Network:
    """Linear layers with tanh between, their gradients, and memory for both, which is kept."""

    def __init__(self, layers: list[tuple[_Parameter, _Parameter]]):
        self.layers = layers
        self.hidden: list[Array] = []  # the input and every hidden layer's tanh
        self._outputs: list[Array] = []  # of each layer, for the most rows that were seen
        self._slopes: list[Array] = []  # and by each layer's input

    def forward(self, values: Array) -> Array:
        """The last layer's output [N, A]; it and what `backward` needs stand until the next call."""
        rows = len(values)
        if not self._outputs or rows > len(self._outputs[0]):
            widths = [len(bias.array) for _, bias in self.layers]
            self._outputs = [numpy.empty((rows, width), dtype=numpy.float32) for width in widths]
            self._slopes = [numpy.empty((2, *output.shape), dtype=numpy.float32) for output in self._outputs]
        self.hidden = [values]
        for i, (weight, bias) in enumerate(self.layers):
            output = numpy.matmul(self.hidden[-1], weight.array.T, out=self._outputs[i][:rows])
            output += bias.array
            if i == len(self.layers) - 1:
                break
            self.hidden.append(numpy.tanh(output, out=output))
        return output

    def backward(self, gradient: Array) -> None:
        """Add the gradients of all layers, given that of the last one's output [N, A]."""
        ones = numpy.ones(len(gradient), dtype=numpy.float32)
        for i in reversed(range(len(self.layers))):
            weight, bias = self.layers[i]
            weight.gradient += gradient.T @ self.hidden[i]
            bias.gradient += ones @ gradient
            if i:
                before, slope = (memory[: len(gradient)] for memory in self._slopes[i - 1])
                numpy.multiply(self.hidden[i], self.hidden[i], out=slope)
                numpy.subtract(1.0, slope, out=slope)  # tanh' = 1 - tanh²
                gradient = numpy.multiply(numpy.matmul(gradient, weight.array, out=before), slope, out=before)


class _Categorical:
    """log softmax of logits [N, A] at the actions [N], and its derivative; `mask` [N, A] are the legal ones.

    Worked out as [A, N]: NumPy is slow over short last dimensions.
    """

    def __init__(self, logits: Array, actions: NDArray[numpy.int64], mask: NDArray[numpy.bool_] | None):
        logits_AN = numpy.ascontiguousarray(logits.T)
        if mask is not None:
            logits_AN = numpy.where(mask.T, logits_AN, numpy.finfo(numpy.float32).min)
        shifted = logits_AN - logits_AN.max(0)
        weights = numpy.exp(shifted)
        total = weights.sum(0)
        self.logs, self.probabilities = shifted - numpy.log(total), weights / total
        self.taken = (actions == numpy.arange(len(logits_AN))[:, None]).astype(numpy.float32)
        self.logprobs = (self.logs * self.taken).sum(0)
        self.entropies = -(self.probabilities * self.logs).sum(0)

    def backward(self, by_logprob: Array, by_entropy: Array | None) -> Array:
        """[N, A]: ∂ log p(a) = 1[a] - p,  ∂ H = -p (log p + H)."""
        gradient = by_logprob.T * (self.taken - self.probabilities)
        if by_entropy is not None:
            gradient -= by_entropy.T * self.probabilities * (self.logs + self.entropies)
        return numpy.ascontiguousarray(gradient.T)


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
        """[N, D]: ∂ by the mean is z/σ; log σ gets z² - 1, and 1 for the entropy."""
        by_log_std = (by_logprob * (self.standard**2 - 1.0)).sum(0)
        if by_entropy is not None:
            by_log_std = by_log_std + by_entropy.sum()
        self.parameter.gradient += by_log_std
        gradient: Array = by_logprob * self.standard * self.inverse
        return gradient


class _StateDependent:
    """The same with a variance for each state, features² [N, F] · σ² [F, D]; no gradient by those."""

    def __init__(self, means: Array, actions: Array, log_std_parameter: _Parameter, latent: Array):
        self.parameter, self.squares = log_std_parameter, latent * latent
        self.sigma_squared = numpy.exp(2.0 * log_std_parameter.array)
        self.variance = self.squares @ self.sigma_squared + 1e-6
        self.off = actions - means
        logs = 0.5 * (numpy.log(self.variance) + LOG_2PI)
        self.logprobs = (-0.5 * self.off**2 / self.variance - logs).sum(1)
        self.entropies = (logs + 0.5).sum(1)

    def backward(self, by_logprob: Array, by_entropy: Array | None) -> Array:
        """[N, D]: ∂ by the mean (a - μ)/v; by the variance ½ ((a - μ)²/v - 1)/v, and ½/v for the entropy."""
        by_variance = by_logprob * (self.off**2 / self.variance - 1.0)
        if by_entropy is not None:
            by_variance = by_variance + by_entropy
        by_variance *= 0.5 / self.variance
        self.parameter.gradient += 2.0 * self.sigma_squared * (self.squares.T @ by_variance)
        gradient: Array = by_logprob * self.off / self.variance
        return gradient

"""What the training loop asks of a policy, and what acting in environments asks in addition."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surefoot.types import Batch, Evaluation

Tensors: TypeAlias = dict[str, Tensor]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Memory: TypeAlias = tuple[NDArray[Any], ...] | None  # of a recurrent policy, outside of training


class Policy(Protocol):
    """A policy with a critic, trained by `train/update.py`.

    The parameters it yields are float32 and the only ones the optimiser and the checkpoint know.
    """

    exact_logprobs: bool  # `evaluate` repeats the sampler's to rounding (float32): they are the old ones
    reads_whole_rows: bool  # a step needs the steps before it; else a minibatch may hold single steps

    @property
    def device(self) -> torch.device:
        """Where batches must live."""

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and parameters, always in the same order."""

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        """Log-probs, values and entropies [B, T] of the actions. Entropy's gradient only on request."""

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """The frozen reference's log-probs [B, T] of the same actions, or None without a reference."""

    def fingerprint(self) -> int:
        """A checksum of the frozen weights: a checkpoint fits only the base it was trained on."""

    def save(self, folder: Path) -> None:
        """Write the policy where others can load it."""


class ActingPolicy(Policy, Protocol):
    """A policy that acts step by step: what `policies/control/policy.py` provides."""

    def prepare(self, observations: Arrays, *, learn: bool = False) -> Tensors:
        """Arrays [N, ...] as tensors."""

    def initial_state(self, rows: int) -> Tensors:
        """What is remembered before the first step; empty without memory."""

    def acting(self) -> AbstractContextManager[Any]:
        """To hold while weights stand still."""

    def noise(self, steps: int, envs: int, generator: torch.Generator) -> Any:
        """Randomness of a rollout, entry t for step t."""

    def act(
        self, observations: Tensors, state: Tensors, *, episode_starts: Tensor, noise: Any = None
    ) -> tuple[Tensor, Tensors]:
        """Actions [N, ...] and what is remembered after them; without noise the greedy ones."""

    def values(self, observations: Tensors, state: Tensors, *, episode_starts: Tensor) -> Tensor:
        """V [N]."""

    def predict(
        self,
        observations: Arrays,
        state: Memory = None,
        episode_start: NDArray[Any] | None = None,
        *,
        noise_from: torch.Generator | None = None,
    ) -> tuple[NDArray[Any], Memory]:
        """Actions [N, ...] and state outside of training; greedy without `noise_from`."""

    def load_extras(self, folder: Path) -> None:
        """Take over what `save` wrote."""

    def state(self) -> dict[str, Any]:
        """What it has learned outside its weights, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

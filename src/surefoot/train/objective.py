"""What an update lowers: the one protocol that `update` and the loop know."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from surefoot.config import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig
from surefoot.core.losses import LossSettings, LossStats, PPOStats
from surefoot.core.schedules import schedule
from surefoot.errors import InputError
from surefoot.policies.base import Policy
from surefoot.types import Batch, Poll

# How an update steps, the same for every objective.
OptimizerSettings = PPOConfig | SFTConfig | RewardModelConfig | DPOConfig
# Sums over a minibatch, by name; they add up over micro-batches and minibatches.
Stats = PPOStats | LossStats


@dataclass
class UpdateResult:
    """What one update did: optimizer steps taken and skipped, and the sums over every minibatch seen."""

    stats: Any = None  # the objective's Stats; None if no minibatch had a finite loss
    first: Any = None  # those of the first minibatch, before any step
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    stopped_early: bool = False
    grad_norm: float = 0.0  # mean over the steps taken, before clipping

    def add(self, stats: Stats) -> None:
        """Count one minibatch in, unless its loss is not finite: one NaN would hide all the others."""
        if stats.is_finite:
            self.first = self.first or stats
            self.stats = stats if self.stats is None else self.stats + stats


@dataclass(frozen=True)
class Moment:
    """How far a run is when an update begins, for what moves on a schedule."""

    update: int  # updates done
    total_updates: int
    left: float  # share of the budget that is left
    functions: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # of `left`, from Python

    def value(self, name: str, highest: float, kind: str, *, warmup: float = 0.0) -> float:
        """A setting as the update has it. Raises InputError for a function that was not given again."""
        if kind != "function":
            return float(highest) * schedule(kind, self.update, self.total_updates, warmup=warmup)
        if name not in self.functions:
            raise InputError(f"ppo.{name} was a function; give it again: PPO.load(folder, env, {name}=...)")
        return float(self.functions[name](self.left))


class Accelerator(Protocol):
    """A policy's PPO gradient without autograd, on parameters that lie end to end while an update lasts."""

    def lent(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[torch.optim.Optimizer]:
        """For one update: an optimizer in `optimizer`'s place, which hands its state back at the end."""

    def gradient(self, batch: Batch, settings: LossSettings, normalize: bool, token_budget: int) -> PPOStats:
        """`PPOObjective.gradient` of all rows of `batch`; `normalize`: whiten their advantages."""


class Objective(Protocol):
    """What training lowers. An objective writes the first members; the others do nothing by default."""

    name: str  # what the names of its metrics begin with: `ppo/grad_norm`
    settings: OptimizerSettings  # by which steps it is lowered
    n_epochs: int = 1  # passes over the data of an update
    accelerator: Accelerator | None = None
    notice: str = ""  # what to print before a run begins
    inputs: Mapping[str, str] = {}  # digests of what it learns from in addition to batches, by key

    def gradient(self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> Any:
        """Add the gradient of the minibatch `rows` to the parameters' `.grad`. Returns its `Stats`.

        It is taken in micro-batches of at most `token_budget` tokens, whose sizes don't change it.
        """

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """What the batch said and the update did, by the names of `train/metrics.py`."""

    def gates(self, stats: Any, *, is_first: bool, exact: bool) -> bool:
        """Whether the step of a minibatch with these `stats` may be taken; False ends the update.

        `is_first`: the policy is still the one that wrote the batch (`exact`: to rounding), or GateError.
        """
        return True

    def prepare(self, batch: Batch, moment: Moment | None = None) -> Batch:
        """Fill in what a batch learns from, such as advantages, with the settings that `moment` gives."""
        return batch

    def select(self, batch: Batch, rows_per_minibatch: int) -> Batch:
        """What the minibatches of an update are cut from."""
        return batch

    def finish(self, batch: Batch) -> None:
        """An update on `batch` is done and logged. Raises GateError if the run cannot go on."""
        return None

    def evaluate(self, examples: int, *, poll: Poll = None) -> dict[str, float]:
        """`eval/…` metrics of held-out examples that belong to the objective."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        return None

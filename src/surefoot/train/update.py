"""From a batch to better weights: epochs × minibatches × micro-batches of an objective, and the steps."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from surefoot.config import PPOConfig
from surefoot.data.batches import minibatches
from surefoot.policies.base import Policy
from surefoot.train import ppo_objective
from surefoot.train.objective import Objective, Stats, UpdateResult
from surefoot.types import Batch

# What the names of a critic's own parameters begin with.
CRITIC_NAMES = ("critic.", "value_head.")


def make_optimizer(
    policy: Policy, objective: Objective | None = None, *, critic_learning_rate: float | None = None
) -> Optimizer:
    """Adam (or RMSprop) over all that the policy trains; a separate critic may have its own step size."""
    settings = PPOConfig() if objective is None else objective.settings
    apart_names, rate = () if critic_learning_rate is None else CRITIC_NAMES, settings.learning_rate
    parameters = list(policy.named_parameters_to_train())
    shared = [parameter for name, parameter in parameters if not name.startswith(apart_names)]
    optimizer: Optimizer
    if getattr(settings, "optimizer", "adam") == "rmsprop":
        optimizer = torch.optim.RMSprop(shared, lr=rate, eps=settings.adam_epsilon)
    else:
        optimizer = torch.optim.Adam(shared, lr=rate, eps=settings.adam_epsilon, fused=True)
    if critic_learning_rate is not None:
        apart = [parameter for name, parameter in parameters if name.startswith(apart_names)]
        optimizer.add_param_group({"params": apart, "scale": critic_learning_rate / rate})
    return optimizer


@dataclass
class TokenBudget:
    """Most tokens in one micro-batch; halves when memory runs out. The gradient does not depend on it."""

    tokens: int

    def shrink(self, error: torch.OutOfMemoryError, smallest: int) -> None:
        """Halve the budget, or give `error` back if one row alone does not fit."""
        if self.tokens <= smallest:
            raise error
        self.tokens //= 2
        torch.cuda.empty_cache()  # nothing where CUDA is not in use


def update(
    policy: Policy,
    batch: Batch,
    objective: Objective | None = None,
    *,
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    generator: torch.Generator | None = None,
    budget: TokenBudget | None = None,
    check_first: bool = False,
) -> UpdateResult:
    """Improve `policy` on `batch`: `n_epochs` passes over it, a step of the optimizer for each minibatch.

    Arguments:
        batch: prepared by the objective; for PPO `advantages(batch)`.
        objective: what is lowered, and by which steps; by default PPO's.
        optimizer: of `make_optimizer`. Give the same one to every update, since it remembers.
        learning_rate: of this update; by default the settings'.
        generator: shuffles the minibatches.
        budget: tokens in a micro-batch; one for all updates remembers how much memory there was.
        check_first: raise GateError if the first minibatch shows that another policy wrote the batch.

    A step whose loss or gradient is not finite is skipped and counted; nothing moves.
    """
    objective = objective or ppo_objective.PPOObjective()
    settings = objective.settings
    optimizer = optimizer or make_optimizer(policy, objective)
    generator = generator or torch.Generator().manual_seed(0)
    budget = budget or TokenBudget(settings.micro_batch_tokens)
    result = UpdateResult()
    if not policy.reads_whole_rows:
        batch = batch.flatten()
    rows_per_minibatch = max(1, settings.batch_size // batch.row_size)
    batch = objective.select(batch, rows_per_minibatch)
    if not len(batch):  # no group is left, or a single step that only reset
        return result
    rate = settings.learning_rate if learning_rate is None else learning_rate
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    accelerator = objective.accelerator
    with nullcontext(optimizer) if accelerator is None else accelerator.lent(optimizer) as optimizer:
        epochs = (minibatches(batch, rows_per_minibatch, generator) for _ in range(objective.n_epochs))
        for piece, rows in itertools.chain.from_iterable(epochs):
            stats = None
            while stats is None:
                optimizer.zero_grad(set_to_none=True)
                try:
                    stats = objective.gradient(policy, piece, rows, token_budget=budget.tokens)
                except torch.OutOfMemoryError as error:  # the same gradient, from smaller micro-batches
                    budget.shrink(error, smallest=int(batch.mask_BT.shape[1]))
            is_first = check_first and not result.steps + result.skipped
            may_step = objective.gates(stats, is_first=is_first, exact=policy.exact_logprobs)
            result.add(stats)
            if not may_step:
                result.stopped_early = True
                break
            take_step(optimizer, stats, settings.max_grad_norm, result)
    result.grad_norm /= max(result.steps, 1)
    return result


def take_step(optimizer: Optimizer, stats: Stats, max_norm: float, result: UpdateResult) -> None:
    """Clip the gradient and step, or skip the step if anything is not finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # A single gradient (`Accelerator`) has its norm in one operation.
    norm_of = torch.nn.utils.get_total_norm if len(gradients) != 1 else torch.linalg.vector_norm
    norm = float(norm_of(gradients if len(gradients) != 1 else gradients[0]))
    if not (math.isfinite(norm) and stats.is_finite):
        optimizer.zero_grad(set_to_none=True)
        result.skipped += 1
        result.skipped_in_a_row += 1
        return
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    optimizer.step()
    result.grad_norm += norm
    result.steps += 1
    result.skipped_in_a_row = 0

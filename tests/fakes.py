"""A policy small enough to be worked out by hand, and trajectories and batches for it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.config import Config, PTXConfig, nested
from surefoot.rollout.batch import text_batch
from surefoot.train.objective import Objective, UpdateResult
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.update import update
from surefoot.types import Batch, Evaluation, StopReason, Trajectory, Turn


def config_of(base: Config | None = None, /, **settings: Any) -> Config:
    """`base` with these settings, by their keywords; unlike a run's, its sizes need not fit each other."""
    config = base or Config()
    given = nested(settings)
    ptx = given.pop("ptx", None)

    def over(section: Any, values: dict[str, Any]) -> Any:
        inner = {k: over(getattr(section, k), v) if k == "critic" and isinstance(v, dict) else v for k, v in values.items()}
        return type(section).model_validate({name: getattr(section, name) for name in type(section).model_fields} | inner)

    for name, values in given.items():
        given[name] = over(getattr(config, name), values) if isinstance(values, dict) else values
    return config.model_copy(update=given if ptx is None else given | {"ptx": PTXConfig.model_validate(ptx)})


VOCABULARY = 7
CPU = torch.device("cpu")


class BigramPolicy(nn.Module):
    """Logits and value are the table rows of the token before: the same bits whatever the padding and the neighbours."""

    exact_logprobs = True
    reads_whole_rows = True

    def __init__(self, *, seed: int = 0, reference: Tensor | None = None, off_mask: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits_VV = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.values_V = nn.Parameter(torch.randn(VOCABULARY, generator=generator))
        self.reference = reference
        self.off_mask = off_mask  # what stands where a policy has nothing to say
        self.seen: list[tuple[int, ...]] = []  # shape of every batch evaluated
        self.before_evaluate: Callable[[Batch], None] = lambda batch: None
        self.on_logits: Callable[[Tensor], Tensor] = lambda logits: logits

    @property
    def device(self) -> torch.device:
        return CPU

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [("logits", self.logits_VV), ("values", self.values_V)]

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        self.seen.append(tuple(batch.mask_BT.shape))
        self.before_evaluate(batch)
        before_BT = batch.observations["tokens"].roll(1, 1)
        logprobs_BTV = torch.log_softmax(self.on_logits(self.logits_VV[before_BT]), dim=-1)
        entropies_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
        chosen_BT = logprobs_BTV.gather(-1, batch.actions_BT[..., None]).squeeze(-1)
        views = (chosen_BT, self.values_V[before_BT], entropies_BT if entropy_gradient else entropies_BT.detach())
        return Evaluation(*(torch.where(batch.mask_BT, view, self.off_mask) for view in views))

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        logprobs_BTV = torch.log_softmax(self.reference[batch.observations["tokens"].roll(1, 1)], dim=-1)
        return logprobs_BTV.gather(-1, batch.actions_BT[..., None]).squeeze(-1)

    def fingerprint(self) -> int:
        return 0

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """Copies of what `backward` left, in the order of the parameters."""
        return [parameter.grad.clone() for _, parameter in self.named_parameters_to_train() if parameter.grad is not None]

    def weights(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [parameter.detach().clone() for _, parameter in self.named_parameters_to_train()]


def trajectory(
    text: str = "fine",
    *,
    prompt: Any = "How are you?",
    prompt_tokens: Sequence[int] = (1, 2),
    tokens: Sequence[int] = (3,),
    reward: float = 0.0,
    stop_reason: StopReason = StopReason.END_TOKEN,
    columns: dict[str, Any] | None = None,
) -> Trajectory:
    """One episode; log-probs and values are 0."""
    zeros = [0.0] * len(tokens)
    written = Turn(list(tokens), text, by_policy=True, logprobs=zeros, values=zeros, entropies=zeros)
    return Trajectory(prompt, [Turn(tuple(prompt_tokens)), written], stop_reason, columns=columns or {}, reward=reward)


def played_batch(policy: BigramPolicy, lengths: Sequence[int], *, seed: int = 0, drift: float = 0.0) -> Batch:
    """A batch with answers of these lengths, as `policy` would have written it, and random rewards at the ends.

    `drift` pushes the old log-probs and values away from the policy's own, as if it had been updated since.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    rows = [trajectory(prompt_tokens=random_tokens(1 + i % 3), tokens=random_tokens(n)) for i, n in enumerate(lengths)]
    batch = text_batch(rows, device=CPU)
    with torch.no_grad():
        view = policy.evaluate(batch)
    policy.seen.clear()
    shape = batch.mask_BT.shape
    batch.logprobs_BT = view.logprobs_BT + drift * torch.randn(shape, generator=generator)
    batch.values_BT = view.values_BT + drift * torch.randn(shape, generator=generator)
    batch.rewards_BT = torch.where(batch.ends_BT, torch.randn(shape, generator=generator), 0.0)
    return batch


def padded(batch: Batch, columns: int, *, poison: float) -> Batch:
    """The batch with more columns on the right, `poison` in all that is masked anywhere."""

    def wider(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, columns)) if value.dim() > 1 else value

    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    changes: dict[str, Any] = {name: wider(value) for name, value in found.items() if isinstance(value, Tensor)}
    changes["observations"] = {name: wider(value) for name, value in batch.observations.items()}
    wide = dataclasses.replace(batch, **changes)
    for name in ("logprobs_BT", "values_BT", "rewards_BT", "bootstrap_BT", "reference_logprobs_BT", "behavior_logprobs_BT"):
        if getattr(wide, name) is not None and len(getattr(wide, name)):
            setattr(wide, name, torch.where(wide.mask_BT, getattr(wide, name), poison))
    return wide


def train(policy: BigramPolicy, batch: Batch, config: Config, **options: Any) -> UpdateResult:
    """An update with all that `config` says of PPO."""
    return update(policy, batch, PPOObjective(config), **options)


def gradient_of(objective: Objective, policy: Any, batch: Batch, *, rows: Tensor | None = None, tokens: int = 1_000) -> Any:
    """A list of copies of the gradients of a minibatch, by default of all rows, and its sums."""
    found, stats = named_gradient(objective, policy, batch, tokens, rows)
    return list(found.values()), stats


def named_gradient(objective: Objective, policy: Any, batch: Batch, tokens: int = 10**6, rows: Tensor | None = None) -> Any:
    """The gradients that a minibatch, by default of all rows, leaves, by parameter, and its sums."""
    parameters = dict(policy.named_parameters_to_train())
    for parameter in parameters.values():
        parameter.grad = None
    rows = torch.arange(len(batch)) if rows is None else rows
    stats = objective.gradient(policy, batch, rows, token_budget=tokens)
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}, stats


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """But for the order of sums."""
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-9, name

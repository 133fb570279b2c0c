"""What the training loop, the façade and callbacks ask of whatever collects batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from surefoot.types import Batch, Demonstration, Episode, Preference, Trajectory

Poll: TypeAlias = Callable[[], None] | None
Evaluated: TypeAlias = tuple[dict[str, float], Sequence[Trajectory | Episode | Demonstration | Preference]]


class Rollout(Protocol):
    """Where batches come from: a policy in an environment. All its randomness follows from counters."""

    unit: str  # what the run's budget counts: episodes, timesteps or examples
    throughput: str  # the metric of masked steps a second

    @property
    def notice(self) -> str:
        """What the user should know before training; mostly nothing."""

    @property
    def latest(self) -> Any:
        """The last step of the environment (`VectorStep`), for callbacks; None where nothing is stepped."""

    @property
    def per_update(self) -> int:
        """Units in one update."""

    @property
    def can_evaluate(self) -> bool:
        """Whether there are held-out episodes."""

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """`count` units as a batch with rewards and reference log-probs. `poll` may raise to abandon it."""

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """`eval/…` metrics of the weights of `version` on held-out episodes, and the episodes."""

    def start_over(self) -> None:
        """Begin new episodes, because somebody else has used the environment."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON; large `tensors` by name, for a separate file."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""

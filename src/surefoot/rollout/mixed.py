"""A task's batches with demonstrations beside them: PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surefoot.rollout.base import Rollout
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.types import Batch


class MixedRollout:
    """Collects as `rollout` does, and hands each step of the update demonstrations to imitate besides.

    Which those are follows from the seed and from how many were handed out before, the one counter to save.
    """

    latest = None

    def __init__(self, rollout: Rollout, demonstrations: DemonstrationRollout):
        self.rollout, self.demonstrations = rollout, demonstrations
        self.unit, self.throughput = rollout.unit, rollout.throughput
        self.handed_out = 0  # demonstrations, counted again in every epoch

    @property
    def per_update(self) -> int:
        """Units in one update, demonstrations not counted."""
        return self.rollout.per_update

    def collect(
        self, *, first: int, count: int, version: int = 0, poll: Callable[[], None] | None = None
    ) -> Batch:
        """The rollout's batch, with `demonstrations` for the update's steps."""
        batch = self.rollout.collect(first=first, count=count, version=version, poll=poll)
        begun, size = self.handed_out, self.demonstrations.per_update

        def take(step: int) -> Batch:
            # Memory may run out in the middle: the same step may ask again, and is given the same.
            self.handed_out = begun + (step + 1) * size
            return self.demonstrations.collect(first=begun + step * size, count=size, version=version)

        batch.demonstrations = take
        return batch

    def evaluate(
        self, episodes: int, *, poll: Callable[[], None] | None = None
    ) -> tuple[dict[str, float], Any]:
        """The rollout's evaluation, and the perplexity of the first `episodes` held-out demonstrations, if there are any."""
        metrics, trajectories = self.rollout.evaluate(episodes, poll=poll)
        if self.demonstrations.can_evaluate:
            likelihood, _ = self.demonstrations.evaluate(episodes, poll=poll)
            metrics["eval/ptx_perplexity"] = likelihood["eval/perplexity"]
        return metrics, trajectories

    @property
    def can_evaluate(self) -> bool:
        """Whether the rollout has held-out episodes."""
        return self.rollout.can_evaluate

    @property
    def notice(self) -> str:
        """That demonstrations were cut, if any were."""
        return self.demonstrations.notice

    def start_over(self) -> None:
        """No environment is stepped here."""

    def state(self) -> dict[str, Any]:
        """The rollout's, the counter, and what the demonstrations were."""
        return {**self.rollout.state(), "ptx": {"handed_out": self.handed_out, **self.demonstrations.state()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`. Raises InputError for other demonstrations than the run was begun with."""
        self.demonstrations.restore(state["ptx"])
        self.rollout.restore(state)
        self.handed_out = int(state["ptx"]["handed_out"])

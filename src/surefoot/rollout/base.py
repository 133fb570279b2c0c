"""What the training loop, the façade and callbacks ask of whatever collects batches."""

import hashlib
import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from surefoot.data.rows import SplitRows, index_in_order
from surefoot.types import Batch, Demonstration, Episode, Poll, Preference, Trajectory

Evaluated: TypeAlias = tuple[dict[str, float], Sequence[Trajectory | Episode | Demonstration | Preference]]


class Rollout(Protocol):
    """Where batches come from: a policy in an environment. All its randomness follows from counters."""

    unit: str  # what the run's budget counts: episodes, timesteps or examples
    per_update: int  # units in one update
    throughput: str  # the metric of masked steps a second
    notice: str = ""  # what the user should know before training
    can_evaluate: bool  # whether there is something held out to evaluate on
    inputs: Mapping[str, str] = {}  # digests of what it learns from, by key: a resume must find the same
    latest: Any = None  # the last step of the environment (`VectorStep`), for callbacks, if any is stepped

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """`count` units as a batch with rewards and reference log-probs."""

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """`eval/…` metrics of the weights of `version` on held-out episodes, and the episodes."""

    def start_over(self) -> None:
        """Begin new episodes, because somebody else has used the environment, if one is stepped."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON; large `tensors` by name, for a separate file."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        return None


def digest(rows: Iterable[Any]) -> str:
    """A digest of rows of plain values; of any other value, such as an image, only its kind counts."""
    found, encoder = hashlib.sha256(), json.JSONEncoder(default=lambda v: type(v).__name__, skipkeys=True)
    for row in rows:
        found.update(encoder.encode(row).encode() + b"\n")
    return found.hexdigest()


class ExampleRollout(Rollout, Protocol):
    """Batches of `batch_size` training examples of `data`, in shuffled passes; nothing is generated.

    What is `seen` of them, held-out ones too, makes their digest. `key` is the settings' section.
    """

    unit: str = "examples"
    throughput: str = "throughput/tokens_per_s"
    data: SplitRows[Any]
    seed: int
    key: str

    def _begin(self, data: SplitRows[Any], seen: Iterable[Any], batch_size: int, seed: int, key: str) -> None:
        self.data, self.seed, self.key = data, seed, key
        self.per_update, self.can_evaluate = min(batch_size, len(data.train)), bool(data.held_out)
        self.inputs = {f"{key}.data": digest(seen)}

    @abstractmethod
    def _training_batch(self, indices: list[int]) -> tuple[Batch, float]:
        """These training examples, and their mean length."""

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """Examples number `first` to `first + count` of the run."""
        started, end = time.perf_counter(), first + count
        indices = [index_in_order(number, len(self.data.train), self.seed) for number in range(first, end)]
        batch, length = self._training_batch(indices)
        batch.version = version
        batch.metrics = {"time/rollout_s": time.perf_counter() - started, "time/score_s": 0.0}
        batch.metrics |= {f"{self.key}/epoch": end / len(self.data.train), "length/mean": length}
        return batch

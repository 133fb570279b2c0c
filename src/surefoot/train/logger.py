"""`model.logger`, with the methods of Stable-Baselines3's: what callbacks record beside the run's metrics."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from surefoot.train.loop import Observer, Progress, Training


class Logger(Observer):
    """`model.logger`: what `record` is given stands in the next update's line of `metrics.jsonl`.

    `target` is a logger of Stable-Baselines3's (`set_logger`), which then gets it all and writes it, too.
    """

    def __init__(self) -> None:
        self.target: Any = None
        self.recorded: dict[str, float] = {}  # that no update has written yet
        self.name_to_value: dict[str, Any] = {}  # the newest of each
        self._is_said = False

    def __getattr__(self, name: str) -> Any:
        if name == "target" or self.target is None:
            raise AttributeError(f"logger.{name}: a logger that was given by set_logger may have it")
        return getattr(self.target, name)

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        """Keep a number for the next update. Anything else is written by the `target` alone."""
        self.name_to_value[key] = value
        if self.target is not None:
            self.target.record(key, value, exclude)
        try:
            self.recorded[key] = float(value)
        except (TypeError, ValueError):
            if self.target is None and not self._is_said:
                self._is_said = True
                what = f"logger.record: {key!r} is a {type(value).__name__} and not written, as numbers are"
                print(f"surefoot: {what}; set_logger takes a logger that writes it", file=sys.stderr)

    def dump(self, step: int = 0) -> None:
        """Let the `target` write; our own files have a line for each update."""
        if self.target is not None:
            self.target.dump(step)

    def log(self, metrics: dict[str, float], progress: Progress, samples: Sequence[Any]) -> None:
        """An update is done."""
        self.name_to_value |= metrics
        if self.target is not None:
            for name, value in metrics.items():
                self.target.record(name, value)
            self.target.dump(progress.collected)


@contextlib.contextmanager
def recording(logger: Logger, training: Training) -> Iterator[None]:
    """Let `logger` observe a training."""
    training.observers.append(logger)
    try:
        yield
    finally:
        training.observers.remove(logger)

"""SIGTERM and Ctrl-C ask a run to save and stop; a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """`signal_number` is set once a stop was asked for. Work that can be abandoned calls `raise_if_set`."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def raise_if_set(self) -> None:
        """Raise Abandon if a stop was asked for."""
        if self.signal_number is not None:
            raise Abandon

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block. Outside the main thread Python allows no handlers: nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # asked twice: the last periodic checkpoint stands
        self.signal_number = number


class Abandon(Exception):
    """The work in hand was given up at once; nothing of it has changed the run's state."""

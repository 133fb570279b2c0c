"""SIGTERM, SIGHUP and Ctrl-C ask a run to save and stop; a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# A launcher that passes signals on (timeout, a batch system) often sends one twice; nobody presses so fast.
ONE_REQUEST_SECONDS = 0.3


class StopRequest:
    """`signal_number` is set once a stop was asked for. Work that can be abandoned calls `raise_if_set`."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._asked_at = 0.0

    def raise_if_set(self) -> None:
        """Raise RolloutAborted if a stop was asked for."""
        if self.signal_number is not None:
            raise RolloutAborted

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block, in the main thread: elsewhere Python allows no handlers."""
        self.signal_number = None  # a stop asked for earlier has been obeyed
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = {signal.SIGTERM, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup the run goes on
            numbers.add(signal.SIGHUP)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one that was not set from Python

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number, self._asked_at = number, time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() - self._asked_at > ONE_REQUEST_SECONDS:
            os._exit(128 + number)  # asked twice: the last periodic checkpoint stands


class RolloutAborted(Exception):
    """The work in hand was given up at once; nothing of it has changed the run's state."""

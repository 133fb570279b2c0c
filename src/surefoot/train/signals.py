"""SIGTERM, SIGHUP and Ctrl-C ask a run to save and stop; a second one stops it at once."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from surefoot.data import user_code
from surefoot.errors import SurefootError, one_line

# A launcher that passes signals on (timeout, a batch system) often sends one twice; nobody presses so fast.
ONE_REQUEST_SECONDS = 0.3
SAVING_SECONDS = 10.0  # how long a second signal waits for a save


class StopRequest:
    """`signal_number` is set once a stop was asked for. Work that can be abandoned calls `raise_if_set`.

    If the user's code runs then, which may never return, that is said at once, and what is whole is saved.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._ignored_until = 0.0
        self._process = 0
        self._save: Callable[[], None] = lambda: None

    def raise_if_set(self) -> None:
        """Raise RolloutAborted if a stop was asked for."""
        if self.signal_number is not None:
            raise RolloutAborted

    @contextlib.contextmanager
    def abandonable(self, save: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Work inside is given up before it calls the user's code; `save` writes what was whole before it."""
        self._save, before = save, self._save
        try:
            with user_code.checking(self.raise_if_set):
                yield
        finally:
            self._save = before

    @contextlib.contextmanager
    def listening(self) -> "Iterator[StopRequest]":
        """Catch the signals inside the block, in the main thread: elsewhere Python allows no handlers."""
        self.signal_number = None  # a stop asked for earlier has been obeyed
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._process = os.getpid()
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
        if os.getpid() != self._process:
            os._exit(128 + number)  # a worker, which inherited this: the run is not its to save
        if self.signal_number is None:
            self.signal_number, self._ignored_until = number, time.monotonic() + SAVING_SECONDS
            with user_code.set_aside() as what:
                if what is not None:
                    _say(f"asked to stop; waiting for {what} to return, the next signal ends it at once")
                    try:
                        self._save()
                    except (SurefootError, OSError) as error:
                        _say(f"could not be saved: {one_line(error)}")
            self._ignored_until = time.monotonic() + ONE_REQUEST_SECONDS
        elif number != signal.SIGHUP and time.monotonic() > self._ignored_until:  # asked twice
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, or in the middle of a write
        print(f"surefoot: {line}", file=sys.stderr, flush=True)


class RolloutAborted(Exception):
    """The work in hand was given up at once; nothing of it has changed the run's state."""

"""A limit of time on programs that come with a model, such as its chat template."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

SECONDS = 5
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc  # in the thread of this number, before its next step


class TooLong(BaseException):
    """Raised in what lasts too long; no `except Exception` on the way can hold it up."""

    def __str__(self) -> str:
        return f"it has no end after {SECONDS} seconds"


class _Clock:
    """A thread that counts the seconds of each block; a suspended process has none."""

    def __init__(self) -> None:
        self.seconds: dict[int, int] = {}  # by thread
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._count, name="time limit", daemon=True)
        self.thread.start()

    def _count(self) -> None:
        while True:
            time.sleep(1.0)
            with self.lock:
                for thread in [*self.seconds]:
                    self.seconds[thread] += 1
                    if self.seconds[thread] > SECONDS:
                        del self.seconds[thread]
                        _raise_in(ctypes.c_ulong(thread), ctypes.py_object(TooLong))


_clocks: list[_Clock] = []


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TooLong in the block, in any thread, soon after `SECONDS`; a call into C is not cut short."""
    if not _clocks or not _clocks[-1].thread.is_alive():  # a fork has none of its parent's threads
        _clocks[:] = [_Clock()]
    clock, thread = _clocks[-1], threading.get_ident()
    clock.seconds[thread] = 0
    try:
        yield
    finally:
        with clock.lock:
            if clock.seconds.pop(thread, None) is None:  # it was raised; where the block just ended, not yet
                _raise_in(ctypes.c_ulong(thread), None)

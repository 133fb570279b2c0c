"""The user's code, run so that all it can do to a run is to return, or to end it with one line."""

import contextlib
import os
import signal
import threading
import traceback

# The `getsignal` of `signal` looks each handler up in an enum, which takes as long as the rest of a guard.
from _signal import getsignal  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator
from signal import SIGHUP, SIGINT, SIGTERM
from types import TracebackType
from typing import Any

import torch
from torch import (  # an environment's every step is guarded
    autocast_decrement_nesting,
    autocast_increment_nesting,
    get_default_dtype,
    get_num_threads,
    is_autocast_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
)

from surefoot.errors import InputError, SurefootError, one_line

_running: "list[Guard]" = []  # the innermost last
_checks: list[Callable[[], None]] = []  # before each piece; the innermost last
_modes: list[torch.inference_mode] = []  # must be kept: they end with the object


class Guard:
    """`with` it runs a piece of the user's code, again and again, but not within itself.

    Whatever it raises is an InputError of one line, `what` `verb` "KeyError: …"; with the place, where
    `called_with` names the arguments. Working directory, default dtype, gradient, inference and autocast
    modes, number of threads and handlers of signals are put back.
    """

    def __init__(self, what: str, verb: str = "raised", *, called_with: str | None = None):
        self.what, self.verb, self.called_with = what, verb, called_with

    def __enter__(self) -> "Guard":
        self._before = _state()
        _running.append(self)
        if _checks and threading.current_thread() is threading.main_thread():  # which alone hears signals
            try:
                _checks[-1]()
            except BaseException:
                _running.remove(self)
                raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        _running.remove(self)
        _restore(self._before)
        if error is None or isinstance(error, SurefootError):  # which says in one line what is wrong
            return
        if isinstance(error, KeyboardInterrupt) and getsignal(SIGINT) is signal.default_int_handler:
            return  # a person's; elsewhere a run listens for that, and this is the code's own
        where = "" if self.called_with is None else self._place(trace, self.called_with)
        raise InputError(f"{self.what} {self.verb} {described(error)}{where}") from error

    def _place(self, trace: TracebackType | None, called_with: str) -> str:
        *ours, last = traceback.extract_tb(trace)  # to find the bug without reading a stack
        if not ours:  # it could not be called at all
            return f"; it is called with the keywords {called_with}"
        return f" ({last.filename}, line {last.lineno})"


@contextlib.contextmanager
def checking(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each piece of the user's code inside the block; it may raise."""
    _checks.append(check)
    try:
        yield
    finally:
        _checks.remove(check)


@contextlib.contextmanager
def set_aside() -> Iterator[str | None]:
    """For a signal's handler: what of the user's code runs now, if any, with the run's state in its place."""
    guard, theirs = (_running[0], _state()) if _running else (None, None)
    if guard is None:
        yield None
        return
    _restore(guard._before)
    try:
        yield guard.what
    finally:
        _restore(theirs)


def described(error: BaseException) -> str:
    """Class and message of an error, in one line, whatever its `__str__` does."""
    try:
        message = one_line(error)
    except BaseException as broken:
        message = f"its message cannot be read, as that raises {type(broken).__name__}"
    kind = type(error).__name__
    return kind if message == kind else f"{kind}: {message}"


def _state() -> tuple[Any, ...]:
    try:
        folder = os.getcwd()
    except OSError:  # it was removed
        folder = None
    return (
        folder,
        is_inference_mode_enabled(),
        is_grad_enabled(),
        get_default_dtype(),
        get_num_threads(),
        is_autocast_enabled("cpu"),
        is_autocast_enabled("cuda"),
        _autocast_depth(),
        getsignal(SIGINT),
        getsignal(SIGTERM),
        getsignal(SIGHUP),
    )


def _restore(before: Any) -> None:
    if (now := _state()) == before:
        return
    for put, old, new in zip(_SETTERS, before, now, strict=True):
        if old is not None and old != new:
            with contextlib.suppress(OSError):  # a folder that was removed
                put(old)


def _set_inference_mode(on: bool) -> None:
    _modes.append(torch.inference_mode(on))
    _modes[-1].__enter__()


def _autocast_depth() -> int:
    autocast_increment_nesting()
    return autocast_decrement_nesting()


def _set_autocast_depth(depth: int) -> None:
    """At 0 the weights that were cast are forgotten; of a region that is never left they would be used on."""
    while (now := _autocast_depth()) != depth:
        (autocast_decrement_nesting if now > depth else autocast_increment_nesting)()


def _handled_by(number: int) -> Callable[[Any], None]:
    def put(handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere none could be set
            signal.signal(number, handler)

    return put


_SETTERS: tuple[Callable[[Any], Any], ...] = (
    os.chdir,
    _set_inference_mode,
    torch.set_grad_enabled,
    torch.set_default_dtype,
    torch.set_num_threads,
    lambda on: torch.set_autocast_enabled("cpu", on),
    lambda on: torch.set_autocast_enabled("cuda", on),
    _set_autocast_depth,
    *(_handled_by(number) for number in (SIGINT, SIGTERM, SIGHUP)),
)

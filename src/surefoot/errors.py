"""What can go wrong, and the exit code each one has.

SurefootError            one line for the user, never a traceback
├── InputError      2    the config, a file, a model folder or a reward is not usable as given
├── GateError       2    a check the program runs on itself did not pass; training would be wrong
├── NonFiniteError  3    losses or gradients stayed non-finite for several steps in a row
└── Interrupted     128 + signal   SIGHUP (129), Ctrl-C (130) or SIGTERM (143); a checkpoint was saved
"""

import contextlib
from collections.abc import Iterator


def printable(text: str) -> str:
    """`text` in one line; what a terminal would obey or not show stands as Python writes it, `\\x1b`."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class SurefootError(Exception):
    """Base of every error that is the user's to fix. `exit_code` is what the command line ends with."""

    exit_code = 2


class InputError(SurefootError):
    """Bad input: says what, where, and how to fix it, in one line."""


class GateError(SurefootError):
    """A start-up gate failed (see `train/gates.py`); the message lists the likely causes."""


class NonFiniteError(SurefootError):
    """The run stopped because several optimiser steps in a row had a non-finite loss or gradient."""

    exit_code = 3


class Interrupted(SurefootError, KeyboardInterrupt):
    """The run was asked to stop by a signal and saved its state first.

    A KeyboardInterrupt too, since programs have `except KeyboardInterrupt: model.save(...)` around `learn`.
    """

    def __init__(self, signal_number: int, message: str = ""):
        super().__init__(message or f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return printable(str(error))[:300] or type(error).__name__


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Make all that a library raises in the block an InputError: `what`, and its words in one line.

    Those written in Rust panic with what is no Exception.
    """
    try:
        yield
    except (SurefootError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {one_line(error)}") from error

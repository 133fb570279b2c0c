"""A run under watch: its folder is held, and TensorBoard and the display see it go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from surefoot.errors import InputError
from surefoot.train import checkpoint, loop
from surefoot.train.observers.tensorboard import TensorBoard


@contextmanager
def watched(training: loop.Training, *, show: bool) -> Iterator[ExitStack]:
    """Hold the run folder, and tell TensorBoard and, with `show`, the display, unless there is nothing left to do.

    Raises InputError if others use the folder, or have.
    """
    with ExitStack() as stack:
        _hold_again(training)
        stack.callback(training.folder.release)
        if not training.is_finished:
            board = TensorBoard(
                training.folder.path / "tensorboard", purge_from=training.progress.updates + 1
            )
            stack.callback(board.close)
            training.observers = [board]
            if show:
                from surefoot.train.observers.display import (
                    Display,
                )  # here: it brings rich, which a quiet run does without

                training.observers.append(stack.enter_context(Display(training.total_updates)))
        yield stack


def _hold_again(training: loop.Training) -> None:
    """Take the run folder, which is free between two `learn`s. Raises InputError if it was used in between."""
    if training.folder.is_held:
        return
    training.folder.hold()
    newest = checkpoint.newest_checkpoint(training.folder.checkpoints)
    if newest is not None and checkpoint.number_of(newest) > training.progress.updates:
        training.folder.release()
        raise InputError(
            f"{training.folder.path} has gone on elsewhere, to {newest.name}; open it with {training.config.opener}.load"
        )

"""The observers of a run: TensorBoard, the trackers it names, and the display where it is wanted."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from surefoot.train import loop
from surefoot.train.observers.tensorboard import TensorBoard
from surefoot.train.observers.trackers import Tracker


@contextmanager
def observed(training: loop.Training, *, show: bool) -> Iterator[None]:
    """Let TensorBoard, trackers and, with `show`, the display observe a training that is not finished.

    Raises InputError if the disk does not take TensorBoard's file.
    """
    with ExitStack() as stack:
        if not training.is_finished:
            folder, purge_from = training.folder.path / "tensorboard", training.progress.updates + 1
            board = stack.enter_context(closing(TensorBoard(folder, purge_from=purge_from)))
            added: list[loop.Observer] = [board]
            for kind in training.config.run.trackers:
                added.append(stack.enter_context(closing(Tracker(kind, training))))
            if show:  # brings rich, which a quiet run does without
                from surefoot.train.observers.display import Display

                added.append(stack.enter_context(Display(training.total_updates)))
            for observer in added:
                training.observers.append(observer)
                stack.callback(training.observers.remove, observer)
        yield

"""The metrics of a run as TensorBoard's event files."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surefoot.storage.files import writing
from surefoot.train import loop

NOTE = "; the last checkpoint stands"


class TensorBoard(loop.Observer):
    """An observer that writes the same metrics for TensorBoard.

    Written here and now, not by torch's SummaryWriter: its thread would find out later that the disk is full,
    and say so in a traceback. Raises InputError then.
    """

    def __init__(self, folder: Path, *, purge_from: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder, self._event, self._summary = folder, Event, Summary
        with writing(folder, NOTE):
            folder.mkdir(exist_ok=True)
            file = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
            self._file = file.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Resuming hides what an abandoned continuation had written.
        self._write(step=purge_from, session_log=SessionLog(status=SessionLog.START))

    def log(self, metrics: dict[str, float], progress: loop.Progress, samples: Sequence[Any]) -> None:
        """Write one point per metric."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=progress.updates, summary=self._summary(value=values))

    def close(self) -> None:
        """End the event file."""
        self._file.close()

    def _write(self, **contents: Any) -> None:
        with writing(self._folder, NOTE):
            self._records.write(self._event(wall_time=time.time(), **contents).SerializeToString())

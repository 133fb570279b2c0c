"""stdout and stderr that outlive whoever reads them: what cannot be shown is lost, and nothing else."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Shown:
    """A text stream whose `write` and `flush` never raise; the first that fails, by `error`, is the last."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Show `text` if anybody can still be shown anything; characters that the stream lacks become `?`."""
        try:
            self._try(self.stream.write, text)
        except UnicodeError:
            self._try(self.stream.write, text.encode("ascii", "replace").decode())
        return len(text)

    def flush(self) -> None:
        """Show what is still buffered."""
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            if self.error is None:
                call(*arguments)
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:  # its terminal or pipe is gone, its disk full; it was closed
            self.error = error
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # or the interpreter's last flush would fail


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """Let stdout and stderr be `Shown` inside the block, for the user's code too: its prints end no run."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    shown = {n: Shown(s) for n, s in before.items() if s is not None and not isinstance(s, Shown)}
    for name, stream in shown.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in shown.items():
            stream.flush()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])

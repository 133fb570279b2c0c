"""A warm interpreter that forks one `surefoot` process per case: what it is worth is the seconds of importing torch.

Run as `python -m tests.train.warm`; jobs come as JSON lines on stdin. A job's `strikes` hit the process from within,
at a place and at a count of calls, so that the same kill can be repeated; the product itself has no hooks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent
# The command line sets the last two itself, but only an interpreter that has not imported the libraries takes notice.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

HANG_UP, TERMINAL = threading.Event(), list[threading.Thread]()


@dataclass
class Strike:
    """At the `nth` call of `module:attribute`: send the process `signals`, or let it write no more than `file_bytes`.

    `since` is another place and a count: calls are counted once that one has been called so often.
    """

    place: str
    nth: int = 1
    signals: Sequence[int] = ()
    file_bytes: int | None = None
    after: bool = False  # once the call is done rather than before it
    pause: float = 0.0  # seconds after each signal
    since: tuple[str, int] | None = None
    hang_up: bool = False  # stdout and stderr are a terminal, until now


@dataclass
class Ended:
    """How a process ended. A negative code is the signal that killed it."""

    code: int
    stdout: str
    stderr: str


def _job(folder: Path, arguments: Sequence[object], strikes: Sequence[Strike]) -> str:
    """One `surefoot` command line, as JSON."""
    hits = [asdict(strike) for strike in strikes]
    return json.dumps({"arguments": [str(a) for a in arguments], "folder": str(folder), "strikes": hits})


def _ended(code: int, folder: Path) -> Ended:
    return Ended(code, *((folder / name).read_text() for name in ("stdout.txt", "stderr.txt")))


class Warm:
    """The tests' side of the warm interpreter, which is started `by` another command if there is one."""

    def __init__(self, *by: str):
        self._by = by

    def __enter__(self) -> Warm:
        command = [*self._by, sys.executable, "-m", "tests.train.warm"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process: Any = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)
        return self

    def seen(self, path: Path) -> Path:
        """A path as the interpreter sees it, which may have a disk of its own there."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def start(self, folder: Path, *arguments: object, strikes: Sequence[Strike] = ()) -> int:
        """Begin `surefoot ARGUMENTS` in `folder`; its process id."""
        self._process.stdin.write(_job(folder, arguments, strikes) + "\n")
        self._process.stdin.flush()
        self._folder = folder
        return int(self._answer())

    def wait(self) -> Ended:
        """Wait for the process begun last."""
        return _ended(int(self._answer()), self._folder)

    def run(self, folder: Path, *arguments: object, strikes: Sequence[Strike] = ()) -> Ended:
        """Begin and wait."""
        self.start(folder, *arguments, strikes=strikes)
        return self.wait()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        assert line, "the warm interpreter died"
        return line


def wait_for(path: Path) -> None:
    """Return as soon as there is something at `path`."""
    give_up = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} never came"
        time.sleep(0.002)


def cold(folder: Path, *arguments: object, strikes: Sequence[Strike] = ()) -> Ended:
    """The same in a fresh interpreter: another hash seed, other addresses, nothing inherited."""
    command = [sys.executable, "-m", "tests.train.warm", _job(folder, arguments, strikes)]
    return _ended(subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode, folder)


def _play(job: dict[str, Any]) -> NoReturn:
    """Be `surefoot` for one job."""
    from surefoot.cli import main as cli

    os.chdir(job["folder"])
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if any(strike["hang_up"] for strike in job["strikes"]):
        _open_terminal()
    for strike in job["strikes"]:
        _arm(Strike(**strike))
    code: int | str | None = 0
    try:
        cli.main(job["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 99
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as the interpreter does
    os._exit(int(code or 0))


def _arm(strike: Strike) -> None:
    if strike.since is None:
        _at_call(strike.place, strike.nth, functools.partial(_hit, strike), after=strike.after)
    else:
        place, count = strike.since
        _at_call(place, count, functools.partial(_arm, replace(strike, since=None)))


def _at_call(place: str, nth: int, act: Callable[[], None], *, after: bool = False) -> None:
    """Call `act` at the `nth` call of `place` from now on."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        is_it = calls == nth
        if is_it and not after:
            act()
        result = function(*arguments, **keywords)
        if is_it and after:
            act()
        return result

    setattr(owner, name, counted)


def _open_terminal() -> None:
    """Let stdout and stderr be a terminal, whose other end is read until `HANG_UP` closes it."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    for descriptor in (1, 2):
        os.dup2(theirs, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))

    def read() -> None:
        while not HANG_UP.wait(0.01):
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)
        os.close(ours)

    TERMINAL.append(threading.Thread(target=read, daemon=True))
    TERMINAL[0].start()


def _hit(strike: Strike) -> None:
    if strike.hang_up:
        HANG_UP.set()
        TERMINAL[0].join()
    if strike.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (strike.file_bytes, strike.file_bytes))
    for number in strike.signals:
        os.kill(os.getpid(), number)
        time.sleep(strike.pause)


def _serve() -> None:
    import peft
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama

    import surefoot.api.ppo

    assert peft and torch and transformers and surefoot
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _play(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _play(json.loads(sys.argv[1]))
    _serve()

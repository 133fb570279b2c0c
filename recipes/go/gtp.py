"""A Go program as a player, over the Go Text Protocol (GTP version 2, lysator.liu.se/~gunnar/gtp)."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Literal, TypeAlias

from surefoot.errors import InputError

Color: TypeAlias = Literal["black", "white"]

COLUMNS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"  # GTP leaves out the I
# PettingZoo counts every stone left on the board as alive. A player that passes once the dead stones are
# plain to see, as GNU Go does if not told to capture them, loses games there that it has won.
GNU_GO = ("gnugo", "--mode", "gtp", "--level", "1", "--chinese-rules", "--never-resign", "--capture-all-dead")


def vertex_of(action: int, size: int) -> str:
    """The GTP vertex of an action of PettingZoo's Go: 0 is the top left, row by row, and size**2 is the pass.

    GTP counts rows from the bottom: on a board of size 5, action 0 is A5, 4 is E5 and 20 is A1.
    """
    if not 0 <= action <= size**2:
        raise InputError(
            f"action {action} is not on a board of size {size}; actions go from 0 to {size**2}, the pass"
        )
    row, column = divmod(action, size)
    return "pass" if action == size**2 else f"{COLUMNS[column]}{size - row}"


def action_of(vertex: str, size: int) -> int:
    """The inverse of `vertex_of`; letters of either case. "resign" is refused: it is not a vertex."""
    if vertex.upper() == "PASS":
        return size**2
    column, row = COLUMNS.find(vertex[:1].upper()), vertex[1:]
    if not (0 <= column < size and row.isdecimal() and 1 <= int(row) <= size):
        raise InputError(f"vertex {vertex!r} is not on a board of size {size}")
    return (size - int(row)) * size + column


class GTPPlayer:
    """A program that speaks GTP on its standard input and output; GNU Go at its weakest by default.

    Every method raises InputError if the program refuses a command (an illegal move, a board size it does not
    know), dies, or has not replied after `timeout` seconds. Use it as a context manager, or `close` it.
    """

    def __init__(self, command: Sequence[str] = GNU_GO, *, timeout: float = 60.0):
        # Debian keeps its games outside of many a PATH.
        program = shutil.which(
            command[0], path=os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/games"
        )
        if program is None:
            raise InputError(f"Go program {command[0]!r} not found; GNU Go comes with: apt install gnugo")
        self.name = command[0]
        self.timeout = timeout
        self._received = b""
        self._process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def clear_board(self, size: int, komi: float) -> None:
        """Start a game on an empty board of size x size points, with `komi` points for white."""
        for command in (f"boardsize {size}", "clear_board", f"komi {komi}"):
            self.send(command)

    def play(self, color: Color, vertex: str) -> None:
        """Put a stone of this color on the program's board; "pass" is a vertex too."""
        self.send(f"play {color} {vertex}")

    def genmove(self, color: Color) -> str:
        """Let the program choose and play a move: a vertex, "pass", or "resign"."""
        return self.send(f"genmove {color}")

    def final_score(self) -> float:
        """Points by which black leads (negative: white), by the program's view of which stones are dead.

        PettingZoo's Go takes every stone for alive; the two agree only on games played out to the end.
        """
        score = self.send("final_score")
        winner, _, points = score.partition("+")
        try:
            return 0.0 if score == "0" else {"B": 1.0, "W": -1.0}[winner.upper()] * float(points)
        except (KeyError, ValueError):
            raise InputError(
                f"{self.name}: final_score returned {score!r}, expected 0, B+points or W+points"
            ) from None

    def send(self, command: str) -> str:
        """Send one command and return the reply's text, without its leading "="."""
        try:
            self._pipe(self._process.stdin).write(f"{command}\n".encode())
        except (BrokenPipeError, ValueError):
            raise InputError(f"{self.name}: cannot send {command!r}, the program has ended") from None
        reply = self._receive(command)
        if not reply.startswith("="):
            raise InputError(f"{self.name}: refused {command!r}: {reply.removeprefix('?').strip()}")
        return reply[1:].strip()

    def _receive(self, command: str) -> str:
        """The next reply; GTP ends each with an empty line."""
        stdout = self._pipe(self._process.stdout)
        deadline = time.monotonic() + self.timeout
        while b"\n\n" not in self._received:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()  # a late reply would be taken for that to the next command
                raise InputError(f"{self.name}: no reply to {command!r} in {self.timeout:g} s")
            data = os.read(stdout.fileno(), 4096)
            if not data:
                raise InputError(f"{self.name}: ended at {command!r} with exit code {self._process.wait()}")
            self._received = (self._received + data.replace(b"\r", b"")).lstrip(b"\n")
        reply, _, self._received = self._received.partition(b"\n\n")
        return reply.decode(errors="replace")

    @staticmethod
    def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None  # both were asked for
        return stream

    def close(self) -> None:
        """Ask the program to quit, and kill it if it does not within a second. Closing twice is harmless."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or was closed already
            self._pipe(self._process.stdin).write(b"quit\n")
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()

    def __enter__(self) -> GTPPlayer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

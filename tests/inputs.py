"""What tests of the outer surface share: a tiny model on disk, a task in a folder, the command line, a full disk."""

import atexit
import contextlib
import errno
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from surefoot import InputError
from surefoot.cli import main as cli
from tests import golden
from tests.tiny import tiny_lm, tiny_tokenizer

PROMPTS = [
    {"prompt": text, "answer": len(text)} for text in ("the film", "a band", "the end", "in and out", "one", "two", "her")
]
REWARD = "def reward(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
CONFIG: dict[str, Any] = {
    "run": {"checkpoint_every": 1},
    "policy": {"model": "model", "adapter": {"rank": 2}, "dtype": "float32"},
    "task": {"prompts": "prompts.jsonl", "reward": "reward.py:reward", "held_out": 0.5},
    "generation": {"max_new_tokens": 2},
    "ppo": {"batch_size": 4, "n_epochs": 1},
    "rollout": {"total_episodes": 8, "episodes_per_update": 4},
    "evaluate": {"every": None, "episodes": 1},
}


@functools.cache
def model_folder(*, chat: bool = False) -> Path:
    """A whole tiny model on disk, made once; copy it before changing it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_lm().save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def write_project(folder: Path, *, reward: str = REWARD, prompts: Sequence[Any] = PROMPTS, **sections: Any) -> Path:
    """config.yaml, prompts.jsonl, reward.py and model/ in `folder`; `sections` are merged over `CONFIG`. The YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(reward)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    if not (folder / "model").exists():
        shutil.copytree(model_folder(), folder / "model")
    config = {name: CONFIG.get(name, {}) | sections.get(name, {}) for name in (*CONFIG, *sections.keys() - CONFIG.keys())}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@dataclass
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a command that refused its input."""
        lines = self.err.splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("surefoot: "), self
        return lines[0].removeprefix("surefoot: ")

    def refused(self, *names: str) -> str:
        """The complaint, in the golden wording and with `names` in it."""
        return golden.check(self.complaint, *names)


def refusal(call: Callable[[], object], *names: str) -> str:
    """The one line of the InputError that `call` raises, in the golden wording if `names` are given, which are in it."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return golden.check(message, *names) if names else message


def run_cli(*arguments: object) -> Outcome:
    """`surefoot arguments` in this process, as the shell sees it. A traceback is not caught."""
    # A fresh process would learn this from the environment, as transformers is imported.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
    return Outcome(code, out.getvalue(), err.getvalue())


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int = 0) -> None:
    """From the `after`-th time on, files whose name starts with `name` cannot be opened for writing: no space left."""
    left, real_open = [after], Path.open

    def open_unless_full(self: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if self.name.startswith(name) and mode[0] in "wax":
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real_open(self, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_unless_full)


class Rows:
    """A stand-in for `datasets.Dataset`, which is not installed here: neither a list nor a Sequence, its rows are dicts."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Any:
        return iter([dict(row) for row in self._rows])

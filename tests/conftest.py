"""Fixtures that several folders of tests share."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import golden, inputs
from tests.train.small_run import outcome, write_base, write_project
from tests.train.warm import Warm, cold

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


@pytest.fixture
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the test's own, where runs may leave what they make."""
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def project(in_own_folder: None, tmp_path: Path) -> Path:
    """The working directory with config.yaml, prompts, reward and model; `write_project` puts other parts in."""
    inputs.write_project(tmp_path)
    return tmp_path


@pytest.fixture
def written(in_own_folder: None) -> Callable[..., Path]:
    """Write text, or bytes, as a file in the working directory; its path."""

    def write(content: str | bytes, name: str = "c.yaml") -> Path:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return Path(name)

    return write


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that small runs start from."""
    folder = tmp_path_factory.mktemp("model") / "base"
    write_base(folder)
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """An interpreter that has imported everything, to run and kill commands in."""
    with Warm() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody disturbed leaves."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = write_project(folder, base)
    ended = cold(folder, "ppo", "ppo.yaml")
    assert ended.code == 0, ended.stderr
    return outcome(run)


def pytest_sessionfinish() -> None:
    """`make messages` leaves in the golden file what the tests have seen, and no other line."""
    if os.environ.get("SUREFOOT_MESSAGES") == "renew":
        golden.write(golden.seen)

"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests import golden
from tests.train.small_run import write_base
from tests.train.warm import Warm


@pytest.fixture
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the test's own, where runs may leave what they make."""
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()


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


def pytest_sessionfinish() -> None:
    """`make messages` leaves in the golden file what the tests have seen, and no other line."""
    if os.environ.get("SUREFOOT_MESSAGES") == "renew":
        golden.write(golden.seen)

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.small_run import outcome, write_base, write_project
from tests.train.warm import Warm, cold


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that every run starts from."""
    folder = tmp_path_factory.mktemp("model") / "base"
    write_base(folder)
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
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

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.small_run import outcome, write_project
from tests.train.warm import cold


@pytest.fixture(scope="session")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody disturbed leaves."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = write_project(folder, base)
    ended = cold(folder, "ppo", "ppo.yaml")
    assert ended.code == 0, ended.stderr
    return outcome(run)

"""Trackers: what they are handed, that a resumed run goes on there, and that none ends a run."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from surefoot import PPO
from surefoot.build import preflight
from surefoot.config import make_config
from tests.golden import refused
from tests.train.small_run import assert_equal, outcome, python_ppo, rows

CLOCK = ("time/", "throughput/", "samples")


class Fake(ModuleType):
    """A library of a tracker that keeps what it is handed; a call in `broken` raises."""

    def __init__(self, name: str, broken: str = ""):
        super().__init__(name)
        self.__spec__, self.seen = ModuleSpec(name, None), []
        for call in ("init", "log", "finish"):
            setattr(self, call, self._keeping(call, broken))
        self.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
        self.MlflowClient = lambda: SimpleNamespace(
            **{call: self._keeping(call, broken) for call in ("create_experiment", "log_dict", "set_terminated")},
            get_experiment_by_name=lambda name: None,
            search_runs=lambda *_, **__: [call for name, call in self.seen if name == "run"][:1],
            create_run=self._run,
            log_metric=lambda run, name, value, step: self.seen.append(("log", ({name: value}, {"step": step}))),
        )

    def _keeping(self, call: str, broken: str) -> Any:
        def kept(*arguments: Any, **settings: Any) -> None:
            if call == broken:
                raise ConnectionError("no network")
            self.seen.append((call, (*arguments, settings)))

        return kept

    def _run(self, experiment: Any, run_name: str, tags: dict[str, str]) -> Any:
        run = SimpleNamespace(info=SimpleNamespace(run_id="1"), tags=tags)
        self.seen.append(("run", run))
        return run

    def logged(self) -> dict[tuple[int, str], float]:
        """(update, metric) -> value."""
        calls = [call for name, call in self.seen if name == "log"]
        pairs = [(metrics, settings["step"]) for metrics, settings in calls]
        return {(step, name): value for metrics, step in pairs for name, value in metrics.items() if not name.startswith(CLOCK)}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_gets_what_the_logs_get_and_a_resumed_run_is_the_same_one_there(tmp_path, base: Path, monkeypatch, name):
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    tracked = {"run": {"trackers": [name]}}
    model = python_ppo(base, tmp_path, **tracked).learn(12)
    run, task = model.run_folder, model.env
    del model
    PPO.load(run, task, verbose=0).learn(6)
    whole = {(row["update"], key): value for row in rows(run) for key, value in row.items() if key != "update"}
    assert fake.logged() == whole
    if name == "mlflow":
        assert [call for call, _ in fake.seen].count("run") == 1
        tables = [
            call[1]["samples"] for call in (call for kind, call in fake.seen if kind == "log_dict") if "samples" in call[1]
        ]
    else:
        first, second = ({key: call[-1].get(key) for key in ("name", "id")} for kind, call in fake.seen if kind == "init")
        assert first == second and any(first.values())
        tables = [call[0]["samples"] for kind, call in fake.seen if kind == "log" and "samples" in call[0]]
    texts = [row["completion"] for row in rows(run, "samples.jsonl") if row["split"] == "held_out"]
    assert [row["completion"] for table in tables for row in table] == texts


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, base: Path, monkeypatch, capfd, broken):
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", broken))
    expected = outcome(python_ppo(base, tmp_path / "plain").learn(12).run_folder)
    run = python_ppo(base, tmp_path / "tracked", run={"trackers": ["wandb"]}).learn(12).run_folder
    said = "surefoot: run.trackers: wandb raised ConnectionError: no network; the run goes on without it\n"
    assert capfd.readouterr().err == said
    assert_equal(run, expected, but=("model",))


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", MagicMock(return_value=None))
    with refused("run.trackers: wandb is not installed", "surefoot[wandb]"):
        preflight.preflight(make_config({"run": {"trackers": ["wandb"]}}, where=""))

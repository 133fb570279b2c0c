"""Trackers that people bring, by the names in `run.trackers`: Weights & Biases, trackio, MLflow."""

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from surefoot.data.user_code import Guard
from surefoot.errors import InputError
from surefoot.train import loop

PROJECT = "surefoot"  # where runs stand at the tracker, unless its own environment variable says otherwise
TABLE_ROWS = 32  # of an evaluation's samples


class Library(Protocol):
    """What is asked of a tracker's library."""

    def __init__(self, library: Any, name: str, identity: str, config: dict[str, Any]):
        """Begin the run called `name`, or go on with the one of this `identity`."""

    def log(self, metrics: dict[str, float], update: int) -> None:
        """Log the metrics of an update or an evaluation."""

    def table(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        """Log samples of an evaluation as a table, one row a sample."""

    def close(self) -> None:
        """End the run there."""


class Tracker(loop.Observer):
    """An observer that hands metrics and evaluated samples to one tracker.

    A run that is resumed goes on there too. What the tracker raises is said on stderr, once, and the run goes
    on without it.
    """

    def __init__(self, kind: str, training: loop.Training):
        self._kind, folder = kind, training.folder
        identity = json.loads((folder.path / "environment.json").read_bytes())["id"]
        about = (folder.path.name, identity, training.config.model_dump(mode="json"))
        self._run: Library | None = None
        self._run = self._tried(lambda: LIBRARIES[kind](importlib.import_module(kind), *about))

    def log(self, metrics: dict[str, float], progress: loop.Progress, samples: Sequence[Any]) -> None:
        """Hand over an update's or an evaluation's metrics, and of an evaluation the samples."""
        if run := self._run:
            self._tried(functools.partial(run.log, metrics, progress.updates))
        if (run := self._run) and samples and "eval/metric" in metrics:
            rows = [_flat(one.record()) for one in samples[:TABLE_ROWS]]
            self._tried(functools.partial(run.table, rows, progress.updates))

    def close(self) -> None:
        """End the run there."""
        if self._run:
            self._tried(self._run.close)

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            with Guard(f"run.trackers: {self._kind}"):
                return call()
        except InputError as error:
            print(f"surefoot: {error}; the run goes on without it", file=sys.stderr)
            self._run = None


class _WandB:
    """Weights & Biases, and trackio, which has the same calls."""

    def __init__(self, library: Any, name: str, identity: str, config: dict[str, Any]):
        self._library = library
        # trackio knows a run by its name, of which there may be one in every folder of runs.
        is_wandb = library.__name__ == "wandb"
        about = {"name": name, "id": identity} if is_wandb else {"name": f"{name}-{identity[:6]}"}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        library.init(project=project, config=config, resume="allow", **about)

    def log(self, metrics: dict[str, float], update: int) -> None:
        self._library.log(metrics, step=update)

    def table(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[row.get(name) for name in columns] for row in rows]
        self._library.log({"samples": self._library.Table(columns=columns, data=data)}, step=update)

    def close(self) -> None:
        self._library.finish()


class _MLflow:
    def __init__(self, library: Any, name: str, identity: str, config: dict[str, Any]):
        self._client = library.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        named = self._client.get_experiment_by_name(project)
        experiment = named.experiment_id if named else self._client.create_experiment(project)
        found = self._client.search_runs([experiment], f"tags.surefoot_id = '{identity}'", max_results=1)
        tags = {"surefoot_id": identity}
        run = found[0] if found else self._client.create_run(experiment, run_name=name, tags=tags)
        self._id = run.info.run_id
        self._client.log_dict(self._id, config, "config.json")

    def log(self, metrics: dict[str, float], update: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=update)

    def table(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        self._client.log_dict(self._id, {"samples": list(rows)}, f"samples/{update:08d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


LIBRARIES: dict[str, type[Library]] = {"wandb": _WandB, "trackio": _WandB, "mlflow": _MLflow}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A sample as plain values of a table: what is nested as JSON."""
    return {
        name: value
        if isinstance(value, (str, int, float, bool)) or value is None
        else json.dumps(value, default=str)
        for name, value in record.items()
    }

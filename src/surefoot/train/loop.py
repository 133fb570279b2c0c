"""THE loop, for every kind of run: collect -> advantages -> update -> log -> evaluate -> save."""

import contextlib
import functools
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from threadpoolctl import threadpool_limits

from surefoot.config import Config
from surefoot.core.seeds import derived_seed
from surefoot.errors import GateError, InputError, Interrupted, NonFiniteError, SurefootError
from surefoot.policies.base import Policy
from surefoot.rollout.base import Rollout
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint
from surefoot.train.objective import Moment, Objective, UpdateResult
from surefoot.train.signals import RolloutAborted, StopRequest
from surefoot.train.update import TokenBudget, update
from surefoot.types import Batch


class Observer(Protocol):
    """Sees the run go by: the progress display, TensorBoard."""

    def phase(self, name: str) -> None:
        """The run starts on `rollout`, `update`, `evaluate` or `save`."""
        return None

    def log(self, metrics: dict[str, float], progress: "Progress", samples: Sequence[Any]) -> None:
        """An update or an evaluation is done; each of `samples` has a `record()`."""


@dataclass
class Progress:
    """How far a run is. Everything here is saved."""

    updates: int = 0
    collected: int = 0  # units of the budget: episodes of a task, timesteps of an environment
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    best_metric: float | None = None
    best_update: int | None = None  # number of updates at the best evaluation
    seconds: float = 0.0
    evaluated_at: int | None = None  # number of updates at the last evaluation


@dataclass
class Training:
    """Everything a run works with. Built by `build/training.py`."""

    config: Config
    policy: Policy
    rollout: Rollout
    objective: Objective
    optimizer: torch.optim.Optimizer
    folder: RunFolder
    total: int  # units of the budget
    progress: Progress = field(default_factory=Progress)
    schedules: dict[str, Callable[[float], float]] = field(default_factory=dict)  # given in Python
    recorded: dict[str, float] = field(default_factory=dict)  # by the user, for the next update's metrics
    inputs: dict[str, str] = field(default_factory=dict)  # digests of what it learns from, by key
    threads: int | None = None  # that torch and NumPy use; None: as many as they take by themselves
    observers: list[Observer] = field(default_factory=list)
    stop: StopRequest = field(default_factory=StopRequest)
    # Called between steps of a rollout; may raise RolloutAborted to end the run.
    on_env_step: Callable[[], None] = lambda: None
    saved_at: int | None = None  # number of updates in the newest checkpoint
    generators: dict[str, Any] | None = None  # from a checkpoint, put back when the loop starts

    @property
    def total_updates(self) -> int:
        """Updates in the whole run."""
        return -(-self.total // self.rollout.per_update)

    @property
    def is_done(self) -> bool:
        """Whether the run has used up its budget."""
        return self.progress.collected >= self.total

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do: the last evaluation and checkpoint are there too."""
        return self.is_done and not _evaluation_is_due(self) and not _checkpoint_is_due(self)

    def poll(self) -> None:
        """Called often while episodes are played. Raises RolloutAborted if the run should end here."""
        self.stop.raise_if_set()
        self.on_env_step()

    def enter(self, phase: str) -> None:
        """Let the observers know what the run starts on."""
        for observer in self.observers:
            observer.phase(phase)


def run(t: Training) -> None:
    """Train until the budget is used up.

    Raises Interrupted after a signal, and whatever is the user's to fix; in each case the state as it was
    after the last whole update is saved first, and stands in memory too.
    """
    _start_generators(t)
    budget, check_first = TokenBudget(t.objective.settings.micro_batch_tokens), True
    with t.stop.listening(), _threads(t.threads):
        while True:
            before = snapshot(t)
            try:
                if _evaluation_is_due(t):
                    evaluate(t, before)
                    before = snapshot(t)
                if _checkpoint_is_due(t):
                    save(t, before)
                if t.is_done:
                    return
                t.poll()
                batch = collect(t, before)
                t.poll()
                result, metrics = train_on(t, batch, budget=budget, check_first=check_first)
            except (RolloutAborted, SurefootError) as error:
                if t.saved_at != t.progress.updates:
                    save(t, before)
                roll_back(t, before, error)
                if t.stop.signal_number is not None:  # whatever else it broke, such as workers
                    raise _interrupted(t) from None
                if isinstance(error, RolloutAborted):  # a callback has seen enough
                    return
                raise
            check_first &= result.stats is None  # an update may have had nothing to learn from
            try:
                log(t, "train", metrics, batch.trajectories)
            finally:  # β moves whatever an observer raises
                _finish(t, batch)


def _finish(t: Training, batch: Batch) -> None:
    bad_steps = t.progress.bad_steps_in_a_row
    try:
        t.objective.finish(batch)
        if bad_steps >= t.objective.settings.max_bad_steps:
            what = f"{bad_steps} optimizer steps in a row had a non-finite loss or gradient and were skipped"
            how = "Try a lower learning_rate or policy.dtype: float32"
            raise NonFiniteError(f"{what}; stopped with a checkpoint in {t.folder.path}. {how}")
    except (GateError, NonFiniteError):
        save(t, snapshot(t))
        raise


def collect(t: Training, before: dict[str, Any]) -> Batch:
    """What the next update learns from; `before` is a `snapshot`, to be saved if that takes for ever."""
    t.enter("rollout")
    p, count = t.progress, t.rollout.per_update
    with t.stop.abandonable(functools.partial(_save_in_between, t, before)):
        return t.rollout.collect(first=p.collected, count=count, version=p.updates, poll=t.poll)


def train_on(
    t: Training, batch: Batch, *, budget: TokenBudget, check_first: bool
) -> tuple[UpdateResult, dict[str, float]]:
    """Prepare the batch and do one update; moves `progress` on. What was done, and its metrics."""
    t.enter("update")
    p, settings, started = t.progress, t.objective.settings, time.perf_counter()
    moment = Moment(p.updates, t.total_updates, 1.0 - p.collected / t.total, t.schedules)
    schedule = (settings.learning_rate, settings.lr_schedule)
    learning_rate = moment.value("learning_rate", *schedule, warmup=settings.lr_warmup)
    shuffle = torch.Generator().manual_seed(derived_seed(t.config.seed, "minibatches", p.updates))
    rest: dict[str, Any] = {"generator": shuffle, "budget": budget, "check_first": check_first}
    batch = t.objective.prepare(batch, moment)
    result = update(t.policy, batch, t.objective, optimizer=t.optimizer, learning_rate=learning_rate, **rest)
    p.updates += 1
    p.collected += len(batch) if batch.collected is None else batch.collected
    p.bad_steps += result.skipped
    p.bad_steps_in_a_row = result.skipped_in_a_row + (0 if result.steps else p.bad_steps_in_a_row)
    name = t.objective.name
    metrics = batch.metrics | t.objective.metrics(batch, result)
    metrics |= {
        f"{name}/learning_rate": learning_rate,
        f"{name}/grad_norm": result.grad_norm,
        f"{name}/skipped_steps": float(p.bad_steps),
        t.rollout.unit: float(p.collected),
        "time/update_s": time.perf_counter() - started,
    }
    seconds = metrics["time/rollout_s"] + metrics["time/score_s"] + metrics["time/update_s"]
    metrics[t.rollout.throughput] = float(batch.mask_BT.sum()) / seconds
    p.seconds += seconds
    return result, metrics


def evaluate(t: Training, before: dict[str, Any]) -> None:
    """Measure on held-out episodes; `progress` remembers whether this was the best so far. See `collect`."""
    t.enter("evaluate")
    p, episodes, poll = t.progress, t.config.evaluate.episodes, t.stop.raise_if_set
    with t.stop.abandonable(functools.partial(_save_in_between, t, before)):
        metrics, trajectories = t.rollout.evaluate(episodes, version=p.updates, poll=poll)
        metrics |= t.objective.evaluate(episodes, poll=poll)
    p.evaluated_at = p.updates
    t.saved_at = None  # a checkpoint of this update, from before a resume, doesn't know of it
    log(t, "held_out", metrics, trajectories)
    if p.best_metric is None or metrics["eval/metric"] > p.best_metric:
        p.best_metric, p.best_update = metrics["eval/metric"], p.updates


def log(t: Training, split: str, metrics: dict[str, float], played: Sequence[Any]) -> None:
    """Write the metrics and samples of an update (`split` is `train`) or an evaluation (`held_out`)."""
    about = {"update": t.progress.updates}
    if split == "train":
        metrics |= {name: value for name, value in t.recorded.items() if name not in metrics}
        t.recorded.clear()
    t.folder.append("metrics.jsonl", [about | metrics])
    t.folder.append("samples.jsonl", [about | {"split": split} | one.record() for one in played])
    for observer in t.observers:
        observer.log(metrics, t.progress, played)


def set_total(t: Training, total: int) -> None:
    """Train to `total` from here on, also after a kill. Raises InputError where that leaves nothing to do."""
    if total <= t.progress.collected:
        what = f"it has had {t.progress.collected} {t.rollout.unit} already"
        raise InputError(f"{t.folder.path}: {what}, and is to end after {total}; ask for more")
    t.total = total
    if t.saved_at is not None:
        before = snapshot(t)
        _write_checkpoint(t, before | {"generators": t.generators or before["generators"]})


def save(t: Training, before: dict[str, Any]) -> None:
    """Write a checkpoint of everything the run's future depends on; `before` is a `snapshot`."""
    t.enter("save")
    _write_checkpoint(t, before)


def _save_in_between(t: Training, before: dict[str, Any]) -> None:
    """Save, unless that is done, within a rollout or an evaluation and unseen by the observers."""
    if t.saved_at != t.progress.updates:
        _write_checkpoint(t, before)


def _write_checkpoint(t: Training, before: dict[str, Any]) -> None:
    t.folder.check_there()
    state = {"progress": asdict(t.progress), "total": t.total, **before, "rollout": {**before["rollout"]}}
    state |= {"inputs": t.inputs, "log_sizes": t.folder.log_sizes()}
    tensors = {"policy": checkpoint.policy_tensors(t.policy)}
    tensors["optimizer"] = checkpoint.optimizer_tensors(t.policy, t.optimizer)
    if "tensors" in state["rollout"]:
        tensors["rollout"] = state["rollout"].pop("tensors")
    folder, updates, keep = t.folder.checkpoints, t.progress.updates, t.config.run.keep_checkpoints
    checkpoint.save_checkpoint(folder, updates, tensors=tensors, state=state, keep=keep)
    t.saved_at = updates
    _point_to_best(t)


def restore(t: Training, path: Path, *, accept_changes: bool = False) -> None:
    """Go on from a checkpoint. Raises InputError if it is damaged, or its inputs have changed unaccepted."""
    tensors, state = checkpoint.load_checkpoint(path)
    try:
        # A run that has just begun has every kind of value that a checkpoint has.
        begun = {"progress": asdict(t.progress), "total": t.total, "log_sizes": t.folder.log_sizes()}
        now = snapshot(t)
        now["rollout"].pop("tensors", None)  # they are in another file
        checkpoint.check_like(state, begun | now, str(path / "state.json"))
        checkpoint.check_inputs(t.folder.path, state["inputs"], t.inputs, accept=accept_changes)
        checkpoint.restore_policy(t.policy, tensors["policy"])
        checkpoint.restore_optimizer(t.policy, t.optimizer, tensors["optimizer"])
        t.progress = Progress(**state["progress"])
        for name, kind in get_type_hints(Progress).items():  # `begun` has None in some places
            if not isinstance(getattr(t.progress, name), kind) or getattr(t.progress, name) is True:
                raise TypeError(f"progress, {name}")
        t.total = state["total"]
        t.objective.restore(state["objective"])
        large = {"tensors": tensors["rollout"]} if "rollout" in tensors else {}
        t.rollout.restore(state["rollout"] | large)
        t.folder.cut_logs(state["log_sizes"])
        t.generators = state["generators"]
    except SurefootError:
        raise
    except Exception as error:  # from deep within what a value of the wrong kind was given to
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path} is not a checkpoint of this version of Surefoot: {wrong}") from error
    t.saved_at = t.progress.updates
    _point_to_best(t)  # a kill may have come between the best checkpoint and its pointer
    checkpoint.settle(path, t.config.run.keep_checkpoints)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch and NumPy use `count` threads inside the block; None leaves them alone."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    with threadpool_limits(count):
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _point_to_best(t: Training) -> None:
    if t.progress.best_update:  # the untrained policy has no checkpoint
        checkpoint.point(t.folder.checkpoints, "best", f"{t.progress.best_update:08d}")


def _start_generators(t: Training) -> None:
    """Put the global generators where they were, or, for a new run, where its seed says.

    An agent's training that was given no seed leaves them alone: nobody expects more of it.
    """
    is_asked_for = t.config.env is None or "seed" in t.config.model_fields_set
    if t.generators is not None:
        checkpoint.restore_generators(t.generators)
    elif t.progress.updates == 0 and t.saved_at is None and is_asked_for:
        checkpoint.seed_generators(derived_seed(t.config.seed, "global generators", 0))
    t.generators = None


def snapshot(t: Training) -> dict[str, Any]:
    """What collecting, updating and evaluating change, other than weights: to be rolled back to."""
    generators = checkpoint.generator_states()
    return {"rollout": t.rollout.state(), "objective": t.objective.state(), "generators": generators}


def roll_back(t: Training, before: dict[str, Any], error: Exception) -> None:
    """Put a `snapshot` back. An environment that has failed may not come back: `error` says why."""
    checkpoint.restore_generators(before["generators"])
    t.objective.restore(before["objective"])
    try:
        t.rollout.restore(before["rollout"])
    except SurefootError:
        if isinstance(error, RolloutAborted) and t.stop.signal_number is None:
            raise


def _evaluation_is_due(t: Training) -> bool:
    p, every = t.progress, t.config.evaluate.every
    if p.evaluated_at == p.updates or not t.rollout.can_evaluate or not t.config.evaluate.episodes:
        return False
    return p.updates == 0 or t.is_done or (every is not None and p.updates % every == 0)


def _checkpoint_is_due(t: Training) -> bool:
    updates, is_best = t.progress.updates, t.progress.best_update == t.progress.updates
    is_wanted = t.is_done or is_best or updates % t.config.run.checkpoint_every == 0
    return updates > 0 and t.saved_at != updates and is_wanted


def _interrupted(t: Training) -> Interrupted:
    assert t.stop.signal_number is not None
    path = str(t.folder.path)
    # What was made in Python is not in the configuration.
    env, supervised = t.config.env, t.config.examples
    named = env.id if env is not None else supervised.data if supervised is not None else t.config.task
    ptx_rows = ", ptx_data=rows" if (ptx := t.config.ptx) is not None and ptx.data is None else ""
    is_in_config = named is not None and not ptx_rows
    source = "data" if supervised else "task" if env is None else "env"
    again = f"{t.config.opener}.load({path!r}, {source}{ptx_rows})"
    how = f"surefoot resume {shlex.quote(path)}" if is_in_config else f"{again}.learn()"
    message = f"stopped after update {t.progress.updates}, saved; continue with: {how}"
    return Interrupted(t.stop.signal_number, message)

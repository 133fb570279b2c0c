"""Callbacks: a user's code that sees a training go by and may end it, with Stable-Baselines3's hooks.

What counts as a step depends on the run. With an environment it is one step of all sub-environments; in every
other run it is one update, once its metrics are known.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy

from surefoot.errors import InputError
from surefoot.train.loop import Progress, Training
from surefoot.train.signals import RolloutAborted


class BaseCallback:
    """Override `_on_step` and the other hooks; False from `_on_step` ends `learn`, its budget used up.

    `training` is the run, `model` what `learn` was called on (None without one), `training_env` its
    environment or task; `n_calls` counts steps, `num_timesteps` units of the run's budget (timesteps,
    episodes or examples). `locals` holds the last step's `rewards`, `dones` and `infos` in a run with an
    environment, and the last update's `metrics` in any other.
    """

    training: Training
    model: Any
    training_env: Any

    def __init__(self, verbose: int = 0):
        self.verbose, self.n_calls, self.num_timesteps = verbose, 0, 0
        self.locals: dict[str, Any] = {}
        self.globals: dict[str, Any] = {}

    def init_callback(self, training: Training, model: Any = None) -> None:
        """Called once before training."""
        self.training, self.model, self.training_env = training, model, getattr(model, "env", None)
        self.num_timesteps = training.progress.collected
        self._init_callback()

    def on_step(self) -> bool:
        """Count the step and ask `_on_step`."""
        self.n_calls += 1
        return self._on_step()

    def _on_step(self) -> bool:
        """Override: a step is done. False ends the training."""
        return True

    def _ignore(self) -> None:
        """What the hooks below do unless they are overridden."""

    _init_callback = _on_training_start = _ignore  # before training; it begins
    _on_rollout_start = _on_rollout_end = _ignore  # a rollout begins; it is over, and the update begins
    _on_training_end = _ignore  # training is over


class CallbackAdapter:
    """Callbacks as the loop knows them: an observer, and what is called between environment steps."""

    def __init__(self, callbacks: list[Any], training: Training):
        self.callbacks, self.training = callbacks, training
        self.num_timesteps = training.progress.collected
        self._seen = getattr(training.rollout, "latest", None)  # the last step of the `learn` before
        self._should_end = False

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a method of those callbacks that have methods."""
        for callback in self.callbacks:
            if isinstance(callback, BaseCallback):
                getattr(callback, hook)(*arguments)

    def phase(self, name: str) -> None:
        """A rollout begins or is over."""
        if name == "rollout":
            self.num_timesteps = self.training.progress.collected  # none of a rollout that was aborted
            self.call("_on_rollout_start")
        elif name == "update":
            self.call("_on_rollout_end")

    def log(self, metrics: dict[str, float], progress: Progress, samples: Sequence[Any]) -> None:
        """An update is done: a step, where no environment has made one."""
        if self.training.config.env is None and "eval/metric" not in metrics:
            self.num_timesteps = progress.collected
            self._step({"metrics": dict(metrics)})

    def on_env_step(self) -> None:
        """Before each step of an environment and after the last. Raises RolloutAborted if it is to end."""
        latest = getattr(self.training.rollout, "latest", None)
        if latest is not None and latest is not self._seen:
            self._seen = latest
            dones = latest.terminated | latest.truncated
            self.num_timesteps += len(dones)
            infos = infos_by_env(latest.infos, len(dones))
            self._step({"rewards": latest.rewards, "dones": dones, "infos": infos})
        if self._should_end:
            raise RolloutAborted

    def _step(self, found: dict[str, Any]) -> None:
        for callback in self.callbacks:
            if isinstance(callback, BaseCallback):
                callback.num_timesteps, callback.locals = self.num_timesteps, found
            result = callback.on_step() if isinstance(callback, BaseCallback) else callback(found, {})
            if result is not None and not result:  # NumPy's False or a 0 ends too
                self._should_end = True
                return


def infos_by_env(infos: Mapping[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dictionary of arrays as the list of dictionaries that Stable-Baselines3 has."""
    found: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        inner = infos_by_env(values, num_envs) if isinstance(values, Mapping) else values
        has_it = infos.get(f"_{name}", numpy.ones(num_envs, dtype=bool))
        for i in numpy.flatnonzero(has_it):
            found[i][name] = inner[i]
    return found


@contextlib.contextmanager
def calling(callback: Any, training: Training, model: Any = None) -> Iterator[CallbackAdapter]:
    """Let `callback` observe a training.

    `callback` is a function `(locals, globals) -> bool | None`, a `BaseCallback`, or a list of them; `model`
    is what they get as theirs. Raises InputError for what is no callback.
    """
    given = callback if isinstance(callback, (list, tuple)) else [] if callback is None else [callback]
    for one in given:
        if not (isinstance(one, BaseCallback) or callable(one)):
            kind = type(one).__name__
            raise InputError(f"callback: expected a function or a surefoot.BaseCallback, got {kind}")
    adapter = CallbackAdapter(list(given), training)
    if not given or training.is_finished:
        yield adapter
        return
    training.on_env_step = adapter.on_env_step
    training.observers.append(adapter)
    try:
        adapter.call("init_callback", training, model)
        adapter.call("_on_training_start")
        yield adapter
    finally:
        training.on_env_step = lambda: None
        training.observers.remove(adapter)
        adapter.call("_on_training_end")

"""Callbacks: a user's code that sees a training go by and may end it, with Stable-Baselines3's hooks.

What counts as a step depends on the run. With an environment it is one step of all sub-environments; in every
other run it is one update, once its metrics are known.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from surefoot.errors import InputError
from surefoot.train.loop import Progress, Training
from surefoot.train.signals import RolloutAborted


class BaseCallback:
    """Override `_on_step` and the other hooks; False from `_on_step` ends `learn`, its budget used up.

    `model` is what `learn` was called on, `training_env` its environment (of `get_env`) or task, `training`
    the run, `logger` the model's; `n_calls` counts steps, `num_timesteps` units of the run's budget
    (timesteps, episodes or examples). `locals` holds `total_timesteps`, in a run with an environment the last
    step's `rewards`, `dones`, `infos`, `new_obs` and `actions`, and the last update's `metrics` in any other.
    """

    model: Any
    parent: Any = None  # a callback of Stable-Baselines3's that calls this one

    def __init__(self, verbose: int = 0):
        self.verbose, self.n_calls, self.num_timesteps = verbose, 0, 0
        self.locals: dict[str, Any] = {}
        self.globals: dict[str, Any] = {}

    training: Any = property(lambda self: self.model._session.training)
    training_env: Any = property(lambda self: getattr(self.model, "get_env", lambda: None)())
    logger: Any = property(lambda self: self.model.logger)

    def init_callback(self, model: Any) -> None:
        """Called once before training."""
        self.model, self.num_timesteps = model, model._session.num_timesteps
        self._init_callback()

    def on_training_start(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """Training begins."""
        self.locals, self.globals = locals_, globals_
        self._on_training_start()

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """A step is done, and this is known of it."""
        self.locals.update(locals_)

    def on_step(self) -> bool:
        """Count the step and ask `_on_step`."""
        self.n_calls += 1
        self.num_timesteps = self.model._session.num_timesteps
        return self._on_step()

    def _on_step(self) -> bool:
        """Override: a step is done. False ends the training."""
        return True

    def on_rollout_start(self) -> None:
        """A rollout begins."""
        self._on_rollout_start()

    def on_rollout_end(self) -> None:
        """A rollout is over, and the update begins."""
        self._on_rollout_end()

    def on_training_end(self) -> None:
        """Training is over."""
        self._on_training_end()

    def _ignore(self) -> None:
        """What the hooks below do unless they are overridden."""

    _init_callback = _on_training_start = _on_rollout_start = _on_rollout_end = _on_training_end = _ignore


class CallbackAdapter:
    """Callbacks as the loop knows them: an observer, and what is called between environment steps."""

    def __init__(self, callbacks: list[Any], training: Training, about: dict[str, Any]):
        self.callbacks, self.training = callbacks, training
        self.num_timesteps = training.progress.collected
        self.about = {"total_timesteps": training.total, **about}
        self._seen = getattr(training.rollout, "latest", None)  # the last step of the `learn` before
        self._should_end = False

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a method of those callbacks that have methods."""
        for callback in self.callbacks:
            if has_hooks(callback):
                getattr(callback, hook)(*arguments)

    def phase(self, name: str) -> None:
        """A rollout begins or is over."""
        if name == "rollout":
            self.num_timesteps = self.training.progress.collected  # none of a rollout that was aborted
            self.call("on_rollout_start")
        elif name == "update":
            self.call("on_rollout_end")

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
            self.num_timesteps += len(latest.rewards)
            found = {"rewards": latest.rewards, "dones": latest.terminated | latest.truncated}
            observations = latest.observations
            found |= {"new_obs": observations.get("obs", observations), "actions": latest.actions}
            self._step(found | {"infos": latest.infos_by_env()})
        if self._should_end:
            raise RolloutAborted

    def _step(self, found: dict[str, Any]) -> None:
        for callback in self.callbacks:
            if has_hooks(callback):
                callback.update_locals(found)
            result = callback.on_step() if has_hooks(callback) else callback({**self.about, **found}, {})
            if result is not None and not result:  # NumPy's False or a 0 ends too
                self._should_end = True
                return


def has_hooks(callback: Any) -> bool:
    """Whether it has a BaseCallback's methods, ours or Stable-Baselines3's."""
    return hasattr(callback, "init_callback") and hasattr(callback, "on_step")


@contextlib.contextmanager
def calling(callback: Any, training: Training, model: Any = None) -> Iterator[CallbackAdapter]:
    """Let `callback` observe a training.

    `callback` is a function `(locals, globals) -> bool | None`, a `BaseCallback` (ours or
    Stable-Baselines3's), or a list of them; `model` is what they get as theirs. Raises InputError for what is
    no callback.
    """
    given = callback if isinstance(callback, (list, tuple)) else [] if callback is None else [callback]
    for one in given:
        if not (has_hooks(one) or callable(one)):
            kind = type(one).__name__
            raise InputError(f"callback: expected a function or a surefoot.BaseCallback, got {kind}")
    adapter = CallbackAdapter(list(given), training, {"self": model})
    if not given or training.is_finished:
        yield adapter
        return
    training.on_env_step = adapter.on_env_step
    training.observers.append(adapter)
    try:
        adapter.call("init_callback", model)
        adapter.call("on_training_start", adapter.about, {})
        yield adapter
    finally:
        training.on_env_step = lambda: None
        training.observers.remove(adapter)
        adapter.call("on_training_end")

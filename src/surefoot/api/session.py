"""One run and its life: what `PPO`, `SFT` and `RewardModel` share, and what the same words mean in each of
them.

learn      Train for a number of units more or, without one, to the end that was asked for last. The run's
           folder is made at the first `learn` and held until it returns; a new run starts Python's, NumPy's
           and torch's global generators from its seed. Whatever stops it leaves a checkpoint, and `learn()`
           goes on from there.
evaluate   The `eval/…` metrics that the run itself logs, of the policy as it is: on the first N held-out
           prompts, examples or preferences, or N episodes; by default N is `evaluate.episodes`.
save       The model and its settings in a folder, without what belongs to the run.
load       Of a run's folder, the run where it stands, bit for bit, with its optimizer and counters; what was
           given in Python is given again. Of a folder that `save` wrote, the model; training it further is
           another run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from surefoot.build.preflight import SETTINGS
from surefoot.build.training import Environment, build_objective, build_rollout, build_training
from surefoot.config import (
    SUPERVISED,
    Config,
    absolute_paths,
    dump_config,
    load_config,
    make_config,
    nested,
    sections_for,
)
from surefoot.data.demonstrations import Demonstrations
from surefoot.envs.gym import Vector
from surefoot.errors import InputError
from surefoot.rollout.base import Rollout
from surefoot.storage.files import whole_folder
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint, loop
from surefoot.train.callbacks import CallbackAdapter, calling
from surefoot.train.objective import Objective
from surefoot.train.observers.observed import observed

# What each kind of run learns from: the argument, what it is, and what of it is held out.
SOURCES = {
    "PPO": ("task", "task", "prompts"),
    "SFT": ("data", "examples", "examples"),
    "RewardModel": ("data", "preferences", "preferences"),
}


class Session:
    """A policy, what it learns in or from (`source`), and the run that `learn` makes of them or that `run`
    is.

    `source` None: nothing to train on. `schedules` are those that are Python functions, `demonstrations`
    those of `ptx`.
    """

    def __init__(
        self,
        config: Config,
        policy: Any,
        source: Environment | None,
        *,
        run: RunFolder | None = None,
        verbose: int = 1,
        demonstrations: Demonstrations | None = None,
        schedules: Mapping[str, Callable[[float], float]] | None = None,
    ):
        self.config, self.policy, self.source = config, policy, source
        self.verbose = verbose
        self._demonstrations, self._schedules = demonstrations, dict(schedules or {})
        self._folder = run
        self._rollout: Rollout | None = None
        self._objective: Objective | None = None
        self._training: loop.Training | None = None
        self._adapter: CallbackAdapter | None = None  # while learning

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once it has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has been trained to its end."""
        return self._training is not None and self._training.is_finished

    @property
    def collected(self) -> int:
        """Units of the budget so far, those of the rollout under way included where callbacks see it."""
        if self._adapter is not None:
            return self._adapter.num_timesteps
        return self._training.progress.collected if self._training is not None else 0

    @property
    def updates(self) -> int:
        """Updates done so far."""
        return self._training.progress.updates if self._training is not None else 0

    @property
    def rollout(self) -> Rollout:
        """What collects the run's batches and evaluates, built when it is first asked for."""
        if self._rollout is None:
            if self.source is None:
                kind = self.config.opener
                argument, what, _ = SOURCES[kind]
                raise InputError(f"there is nothing to train on; give the {what}: {kind}(model, {argument})")
            self._rollout = build_rollout(self.config, self.policy, self.source)
            self._objective = build_objective(self.config, self.policy, self._rollout, self._demonstrations)
            if self.verbose and (notice := self._rollout.notice or self._objective.notice):
                print(notice)
        return self._rollout

    @property
    def training(self) -> loop.Training:
        """What the loop works with, built when it is first asked for; for a new run that makes its folder."""
        if self._training is None:
            rollout = self.rollout  # refused without a source
            assert self.source is not None
            self._training = build_training(
                self.config,
                self.policy,
                self.source,
                self._folder,
                rollout=rollout,
                objective=self._objective,
            )
            self._training.schedules = self._schedules
            self._folder = self._training.folder
        return self._training

    def learn(
        self,
        more: int | None = None,
        *,
        callback: Any = None,
        model: Any = None,
        show: bool = False,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Train for `more` units of the budget, or to the end that was asked for last; `finish` is called
        before others may have the folder. `model` is what callbacks get as theirs; `show` shows the display
        even where `verbose` is 0.
        """
        training = self.training
        if more is not None:
            training.total = training.progress.collected + more
        with self._held(training), observed(training, show=bool(self.verbose or show)):
            with calling(callback, training, model) as self._adapter:
                try:
                    if not training.is_finished:
                        loop.run(training)
                finally:
                    self._adapter = None
            finish()

    def start_over(self) -> None:
        """Let an environment's training begin new episodes. Raises InputError in the middle of a rollout."""
        if self._training is not None:
            self._training.rollout.start_over()  # type: ignore[attr-defined]

    def evaluate(self, count: int | None, name: str) -> dict[str, float]:
        """`eval/…` metrics of the policy as it is; the caller's `count` is called `name`.

        Raises InputError where nothing is held out.
        """
        check_count(name, count)
        if not (count := count or self.config.evaluate.episodes):
            raise InputError(f"evaluate.episodes is 0; say how many: evaluate({name}=64)")
        rollout = self.rollout
        if not rollout.can_evaluate:
            *_, held_out = SOURCES[self.config.opener]
            what = f"no held-out {held_out} to evaluate on; give more of them, or a larger held_out"
            if self.config.env is not None:
                what = "evaluate needs an environment id; without one use evaluate_policy(model, env)"
            raise InputError(what)
        metrics, _ = rollout.evaluate(count, version=self.updates)
        assert self._objective is not None
        return metrics | self._objective.evaluate(count)

    def save(self, folder: str | Path, config: Config | None = None) -> None:
        """Write the policy and its settings, or those of `config`.

        Raises InputError if the disk does not take it.
        """
        folder = Path(folder)
        try:
            # A new folder appears when it is whole; one that exists is written into.
            with contextlib.nullcontext(folder) if folder.exists() else whole_folder(folder) as place:
                self.policy.save(place)
                if isinstance(self.source, Vector):
                    self.source.save(place)
                # Without `run` and the supervised sections: what is trained from it is another run.
                settings = dump_config(
                    absolute_paths(config or self.config), exclude={"run", "new_model", *SUPERVISED}
                )
                (place / SETTINGS).write_text(settings, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{folder} could not be written: {reason}") from error

    @contextlib.contextmanager
    def _held(self, training: loop.Training) -> Iterator[None]:
        """Hold the run folder, which is free between two `learn`s.

        Raises InputError if others use it, or have.
        """
        folder = training.folder
        if not folder.is_held:
            folder.hold()
            newest = checkpoint.newest_checkpoint(folder.checkpoints)
            if newest is not None and checkpoint.number_of(newest) > training.progress.updates:
                folder.release()
                raise InputError(
                    f"{folder.path} has gone on elsewhere, to {newest.name}; "
                    f"open it with {self.config.opener}.load"
                )
        try:
            yield
        finally:
            folder.release()


def open_folder(folder: str | Path, kind: str, *, is_given: bool = False) -> tuple[Config, RunFolder | None]:
    """The settings in a folder and, where it is a run's, the run. `is_given`: what it learns from is given in
    Python.

    Raises InputError for a folder that `kind` cannot load, or a run from Python without what it learns from.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        if not (folder / SETTINGS).is_file():
            raise InputError(
                f"{folder} is neither a run folder (config.yaml) nor a model that Surefoot saved ({SETTINGS})"
            )
        return load_config(folder / SETTINGS), None
    run = RunFolder.open(folder)
    config = run.config()
    if config.opener != kind:
        raise InputError(
            f"{folder} is a run of {config.opener}; go on with {config.opener}.load({str(folder)!r})"
        )
    supervised = config.sft or config.reward_model
    is_known = config.env or config.task if supervised is None else supervised.data
    if not (is_given or is_known):
        argument, what, _ = SOURCES[kind]
        raise InputError(
            f"{folder} was started from Python; go on there with its {what}: {kind}.load(folder, {argument})"
        )
    return config, run


@contextlib.contextmanager
def resuming(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder from here on; if what follows fails, release it."""
    run.hold()
    try:
        yield
    except BaseException:
        run.release()
        raise


def check_policy(policy: Any, *kinds: type) -> None:
    """Raise InputError unless `policy` names a model, or is one of these kinds."""
    if not isinstance(policy, (str, Path, *kinds)):
        given = type(policy).__name__
        raise InputError(
            f"policy: expected a model's name or folder, or what load_policy gives, got a {given}"
        )


def check_count(name: str, value: int | None) -> None:
    """Raise InputError unless `value` is None or a whole number above 0."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InputError(f"{name}: expected a whole number above 0, got {value!r}")


def merge(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` into nested `data`, section by section; an adapter's settings stand together."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict) and key != "adapter":
            merge(data[key], value)
        else:
            data[key] = value


def supervised_config(
    section: Literal["sft", "reward_model"],
    policy: Any,
    data: Any,
    *,
    config: Config | None,
    settings: dict[str, Any],
    is_begun: bool,
) -> Config:
    """`config` for supervised training of `policy` on `data`, with `settings` over it; of a run that is
    begun, its own.
    """
    values = sections_for(config, section)
    values[section] = values.get(section) or {}
    values["new_model"] = None  # made before; with it policy.model could be nothing but a folder's path
    merge(values, nested(settings, section))
    # A file may be named once more for a run that goes on; its own name for it stays.
    if data is not None and not is_begun:
        values[section]["data"] = str(data) if isinstance(data, (str, Path)) else None
    if isinstance(policy, (str, Path)):
        values.setdefault("policy", {})["model"] = str(policy)
    return make_config(values, where="SFT(...)" if section == "sft" else "RewardModel(...)")

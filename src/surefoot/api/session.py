"""One run and its life: what `PPO`, `SFT`, `RewardModel` and `DPO` share, and what their methods mean.

learn      Train for a number of units more or, without one, to the end that was asked for last. The run's
           folder is made at the first `learn` and held until it returns; a new run starts Python's, NumPy's
           and torch's global generators from its seed, an agent's only from one that was given. A signal and
           any of our errors leave a checkpoint, and `learn()` goes on from there.
evaluate   The `eval/…` metrics that the run itself logs, of the policy as it is: on the first N held-out
           prompts, examples or preferences, or N episodes; by default N is `evaluate.episodes`.
save       The model and its settings in a folder, without what belongs to the run.
load       Of a run's folder, the run where it stands, bit for bit, with its optimizer and counters; what was
           given in Python is given again. What it learns from must be as it was, but for `accept_changes`.
           Of a folder that `save` wrote, the model; training it further is another run.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from surefoot.build.preflight import SETTINGS
from surefoot.build.training import (
    Environment,
    Examples,
    build_objective,
    build_rollout,
    build_training,
    total_of,
)
from surefoot.config import Config, absolute_paths, dump_config, load_config, make_config, sections_for
from surefoot.config.keywords import nested
from surefoot.config.kinds import SUPERVISED
from surefoot.data.demonstrations import Demonstrations
from surefoot.envs.gym import Vector
from surefoot.errors import InputError
from surefoot.rollout.base import Rollout
from surefoot.storage.files import whole_folder, writing
from surefoot.storage.run_folder import RunFolder
from surefoot.storage.streams import outlived
from surefoot.train import checkpoint, loop
from surefoot.train.callbacks import CallbackAdapter, calling
from surefoot.train.logger import Logger, recording
from surefoot.train.objective import Objective
from surefoot.train.observers.observed import observed

# What each kind of run learns from: the argument, what it is, and what of it is held out.
SOURCES = {
    "PPO": ("task", "task", "prompts"),
    "SFT": ("data", "examples", "examples"),
    "RewardModel": ("data", "preferences", "preferences"),
    "DPO": ("data", "preferences", "preferences"),
}


class Session:
    """A policy, what it learns in or from (`source`), and the run that `learn` makes of them, or `run`.

    `source` None: nothing to train on. `schedules` are those that are functions, `demonstrations` `ptx`'s.
    """

    def __init__(self, config: Config, policy: Any, source: Any, *, run: RunFolder | None, verbose: int):
        self.config, self.policy, self.verbose = config, policy, verbose
        self.source: Environment | None = source
        self.schedules: Mapping[str, Callable[[float], float]] = {}
        self.demonstrations: Demonstrations | None = None
        self.folder = run  # once the run has begun
        self.accept_changes = False  # of its inputs, when it goes on
        self.logger = Logger()
        self._training: loop.Training | None = None
        self.adapter: CallbackAdapter | None = None  # of a `learn` with a callback

    @property
    def num_timesteps(self) -> int:
        """Units of the budget so far, those of the rollout under way, or of one that was ended, included."""
        return self.progress.collected if self.adapter is None else self.adapter.num_timesteps

    @property
    def progress(self) -> loop.Progress:
        """How far the run is."""
        return self._training.progress if self._training else loop.Progress()

    @functools.cached_property
    def parts(self) -> tuple[Rollout, Objective]:
        """What collects batches and evaluates, and what a batch is trained on, built when first asked for."""
        if self.source is None:
            kind = self.config.opener
            argument, what, _ = SOURCES[kind]
            if kind == "RewardModel":  # one without preferences is what `save` wrote
                how = "to train or evaluate it load its run: RewardModel.load(run_folder)"
                raise InputError(f"a saved reward model only scores; {how}")
            raise InputError(f"nothing to train or evaluate on; give the {what}: {kind}(model, {argument})")
        rollout = build_rollout(self.config, self.policy, self.source)
        objective = build_objective(self.config, self.policy, rollout, self.demonstrations)
        notices = (getattr(self.policy, "notice", ""), rollout.notice or objective.notice)
        if self.verbose and any(notices):
            print("\n".join(filter(None, notices)))
        return rollout, objective

    @property
    def training(self) -> loop.Training:
        """What the loop works with, built when it is first asked for; for a new run that makes its folder."""
        if self._training is None:
            given: Any = {"folder": self.folder, "accept": self.accept_changes}
            training = build_training(self.config, self.policy, self.source, self.parts, **given)
            training.schedules, training.recorded = dict(self.schedules), self.logger.recorded
            self._training, self.folder = training, training.folder
        return self._training

    def learn(
        self,
        more: int | None,
        name: str,
        *,
        callback: Any,
        model: Any,
        show: bool = False,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Train for `more` units or epochs, which the caller calls `name`, or to the end asked for last.

        `model` is what callbacks get; `show` overrides `verbose`; `finish` is called with the folder held.
        """
        check_count(name, more)
        training = self.training
        if more is not None:
            units = len(self.source.train) if isinstance(self.source, Examples) else 1
            training.total = training.progress.collected + more * units
        is_shown, self.adapter = bool(self.verbose or show), None
        if more is None and training.is_finished:  # the command line, which has its own words, shows none
            what = f"{training.folder.path} has been trained to its end; learn({name}=N) trains it further"
            warnings.warn(what, stacklevel=3)
        with outlived(), self._held(training), observed(training, show=is_shown):
            with calling(callback, training, model) as adapter, recording(self.logger, training):
                self.adapter = adapter if callback else None
                if not training.is_finished:
                    loop.run(training)
            finish()

    def set_total(self, config: Config) -> None:
        """Train to the end that `config` names, whatever was asked for last."""
        loop.set_total(self.training, total_of(config, self.source))

    def start_over(self) -> None:
        """Let an environment's training begin new episodes. Raises InputError in the middle of a rollout."""
        if self._training is not None:
            self._training.rollout.start_over()  # type: ignore[attr-defined]

    def evaluate(self, count: int | None, name: str) -> dict[str, float]:
        """`eval/…` metrics; the caller's `count` is called `name`. Raises InputError: nothing held out."""
        check_count(name, count)
        if not (count := count or self.config.evaluate.episodes):
            raise InputError(f"evaluate.episodes is 0; say how many: evaluate({name}=64)")
        rollout, objective = self.parts
        if not rollout.can_evaluate:
            if self.config.env is not None:
                raise InputError("evaluate needs an environment id; or use evaluate_policy(model, env)")
            *_, held_out = SOURCES[self.config.opener]
            raise InputError(f"no held-out {held_out} to evaluate on; give more, or a larger held_out")
        metrics, _ = rollout.evaluate(count, version=self.progress.updates)
        return metrics | objective.evaluate(count)

    def save(self, folder: str | Path, config: Config | None = None) -> None:
        """Write the policy and its settings, or those of `config`. Raises InputError if the disk refuses."""
        if not isinstance(folder, (str, Path)):
            raise InputError(f"save: a folder's path is needed, not a {type(folder).__name__}")
        folder, config = Path(folder), absolute_paths(config or self.config)
        # A new folder appears when it is whole; one that exists is written into.
        aside = contextlib.nullcontext(folder) if folder.exists() else whole_folder(folder)
        with writing(folder), aside as place:
            self.policy.save(place)
            if isinstance(self.source, Vector):
                self.source.save(place)
            # What is trained from it is another run, and after a supervised one of another kind.
            foreign = {"run", "new_model", *SUPERVISED} | ({"evaluate"} if config.supervised else set())
            (place / SETTINGS).write_text(dump_config(config, exclude=foreign), encoding="utf-8")

    @contextlib.contextmanager
    def _held(self, training: loop.Training) -> Iterator[None]:
        """Hold the folder, free between two `learn`s. Raises InputError if others use it, or have."""
        folder = training.folder
        try:
            if not folder.is_held:
                folder.hold()
                newest = checkpoint.newest_checkpoint(folder.checkpoints)
                if newest is not None and checkpoint.number_of(newest) > training.progress.updates:
                    how = f"open it with {self.config.opener}.load"
                    raise InputError(f"{folder.path} has gone on elsewhere, to {newest.name}; {how}")
            folder.is_at_work = True
            yield
        finally:
            folder.release()


def open_folder(folder: str | Path, kind: str, *, is_given: bool = False) -> tuple[Config, RunFolder | None]:
    """The settings in a folder and, where it is a run's, the run. Raises InputError if not `kind`'s.

    `is_given`: what it learns from is given in Python; a run that was begun so is refused without.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        if not (folder / SETTINGS).is_file():
            raise InputError(f"{folder} is neither a run folder (config.yaml) nor a saved model ({SETTINGS})")
        return load_config(folder / SETTINGS), None
    run = RunFolder.open(folder)
    config = run.config()
    if config.opener != kind:
        how = f"go on with {config.opener}.load({str(folder)!r})"
        raise InputError(f"{folder} is a run of {config.opener}; {how}")
    is_known = config.env or config.task if config.examples is None else config.examples.data
    if not (is_given or is_known):
        argument, what, _ = SOURCES[kind]
        how = f"go on there with its {what}: {kind}.load(folder, {argument})"
        raise InputError(f"{folder} was started from Python; {how}")
    return config, run


class HasSession(Protocol):
    """What `PPO`, `SFT` and `RewardModel` say of their run alike."""

    _session: Session

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once it has begun."""
        return self._session.folder.path if self._session.folder else None

    @property
    def logger(self) -> Any:
        """Takes numbers by `record(name, value)`, which stand in the run's metrics."""
        return self._session.logger

    @property
    def is_finished(self) -> bool:
        """Whether the run has been trained to its end."""
        return self._session._training is not None and self._session._training.is_finished


Opened = TypeVar("Opened", bound=HasSession)


def resume(
    run: RunFolder, opener: Callable[..., Opened], *arguments: Any, accept_changes: bool = False, **given: Any
) -> Opened:
    """What `opener` makes of a run, at its newest checkpoint; the folder is held from here on."""
    run.hold()
    try:
        model = opener(*arguments, run=run, **given)
        model._session.accept_changes = accept_changes
        _ = model._session.training
    except BaseException:
        run.release()
        raise
    return model


def check_policy(policy: Any, settings: Mapping[str, Any], *kinds: type) -> None:
    """Raise InputError unless `policy` alone names a model, or is one of these kinds."""
    if "model" in settings:
        raise InputError("model: the policy is what is given first; leave model out")
    if not isinstance(policy, (str, Path, *kinds)):
        what = f"expected a model's name or folder, or what load_policy gives, got a {type(policy).__name__}"
        raise InputError(f"policy: {what}")


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


def supervised_config(section: str, policy: Any, data: Any, config: Config | None, settings: Any) -> Config:
    """`config`, with `settings` over it, for training `policy` on `data`, or on what the section names."""
    values = sections_for(config, section)
    values[section] = values.get(section) or {}
    values["new_model"] = None  # made before; with it policy.model could be nothing but a folder's path
    merge(values, nested(settings, section))
    merge(values, {section: {"data": named_file(data)}} if data is not None else {})
    merge(values, {"policy": {"model": str(policy)}} if isinstance(policy, (str, Path)) else {})
    return make_config(values, where=f"{SUPERVISED[section]}(...)")


def named_file(data: Any) -> str | None:
    """The name of data that is a file; what is given takes precedence over the one that a section names."""
    return str(data) if isinstance(data, (str, Path)) else None

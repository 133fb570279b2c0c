"""`RewardModel`: a score for texts, learned from people's preferences with the loop, the run folder and the resume of `PPO`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surefoot.api.ppo import check_count, merge, save_policy
from surefoot.build.language import build_policy, build_preferences, build_reward_policy, load_reward
from surefoot.build.preflight import SETTINGS, preflight
from surefoot.build.training import build_training
from surefoot.config import Config, load_config, make_config, nested, sections_for
from surefoot.data.preferences import PreferenceDataset
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.policies.lm.reward_model import RewardModelPolicy
from surefoot.rewards.model import RewardScorer
from surefoot.rollout.preferences import PreferenceRollout
from surefoot.storage.files import write_durably
from surefoot.storage.run_folder import RunFolder
from surefoot.train import loop
from surefoot.train.observers.watch import watched


class RewardModel:
    """Learn to score texts as people judged them, and be the reward of a task: `TextTask(prompts, RewardModel.load(folder))`.

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`, which is taken
    over; `data` a JSONL file, a list or a `datasets.Dataset` of pairs, `{"prompt"?, "chosen", "rejected", "margin"?}`, or of
    ratings, `{"prompt"?, "text" or "completion", "rating"}`. The score is read at the end token after the text.

    Settings are the fields of the configuration by their plain names: `learning_rate=1e-4`, `epochs=2`, `center=0.01`,
    `rating_range=[-4, 4]`, `adapter=None`, `seed=3`, `run_name="mine"`; `config` gives them all at once. `verbose=0` shows
    nothing; `run` is an existing run folder to go on in (`RewardModel.load` passes it). Raises InputError for anything
    unusable, before a model is loaded where that can be known.
    """

    def __init__(
        self,
        policy: str | Path | CausalLMPolicy | RewardModelPolicy,
        data: Any = None,
        *,
        config: Config | None = None,
        verbose: int = 1,
        run: RunFolder | None = None,
        **settings: Any,
    ):
        settings_of_run = sections_for(config, "reward_model")
        settings_of_run["reward_model"] = settings_of_run.get("reward_model") or {}
        merge(settings_of_run, nested(settings, "reward_model"))
        if data is not None and run is None:  # what is given goes before what the configuration names
            settings_of_run["reward_model"]["data"] = str(data) if isinstance(data, (str, Path)) else None
        if isinstance(policy, (str, Path)):
            settings_of_run.setdefault("policy", {})["model"] = str(policy)
        elif not isinstance(policy, (CausalLMPolicy, RewardModelPolicy)):
            kind = type(policy).__name__
            raise InputError(
                f"policy: expected a model's name or folder, or what load_policy gives, got a {kind}"
            )
        self.config = make_config(settings_of_run, where="RewardModel(...)")
        self.verbose = verbose
        self._folder = run
        self._training: loop.Training | None = None
        self._calibrated_at: int | None = None  # number of updates
        self._calibration: dict[str, Any] = {}
        self.data: PreferenceDataset | None = None
        if isinstance(policy, RewardModelPolicy):  # one that was saved: to score with
            self.policy = policy
            return
        if run is None:
            preflight(self.config)
        # A file may be named once more for a run that goes on; its own name for it stays.
        self.data = build_preferences(self.config, data)
        trunk = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self.policy = build_reward_policy(self.config, trunk)

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once `learn` has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the run that `learn` began has been trained to its end."""
        return self._training is not None and self._training.is_finished

    def learn(self, total_epochs: int | None = None) -> RewardModel:
        """Train for `total_epochs` more passes over the preferences, or, without a number, to the end that was asked for last.

        Everything the run leaves is in `run_folder`, at the end also `calibration.json` and, where matplotlib is installed, its
        plot `calibration.png`. A new run starts Python's, NumPy's and torch's global generators from
        its seed. Raises Interrupted after SIGTERM or Ctrl-C, once it has saved; `learn()` then goes on.
        """
        check_count("total_epochs", total_epochs)
        training = self._prepare_training()
        if total_epochs is not None and self.data is not None:
            training.total = training.progress.collected + total_epochs * len(self.data.train)
        with watched(training, show=bool(self.verbose)):
            if not training.is_finished:
                loop.run(training)
            self._calibrate()
            _write_calibration(training.folder.path, self._calibration)
        return self

    def evaluate(self, examples: int | None = None) -> dict[str, float]:
        """`eval/…` metrics of the current model on held-out preferences, the first `examples` of them or all.

        Raises InputError without any.
        """
        check_count("examples", examples)
        training = self._prepare_training()
        if not training.rollout.can_evaluate:
            raise InputError(
                "no held-out preferences to evaluate on; give RewardModel a held_out fraction above 0"
            )
        held_out = self.data.held_out if self.data is not None else []
        metrics, _ = training.rollout.evaluate(examples or len(held_out))
        return metrics

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """One reward a completion, calibrated: over the held-out texts (without any, the training's) mean 0, deviation 1.

        Prompts and completions are strings, which are read as one text, or message lists. Before `learn` this begins the run
        folder. Raises InputError for a text longer than the model's context.
        """
        self._calibrate()
        return RewardScorer(self.policy)(prompts, completions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """`score` with a reward function's signature."""
        return self.score(prompts, completions)

    def save(self, folder: str | Path) -> None:
        """Write the model, the adapter merged in, with its head and calibration: what `task.reward` and `RewardModel.load`
        take. Raises InputError if the disk does not take it.
        """
        self._calibrate()
        save_policy(self.policy, self.config, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, data: Any = None, *, verbose: int = 1) -> RewardModel:
        """A saved reward model, to score with; or a run folder, to go on in, bit for bit, with its optimiser and counters.

        `data` is for a run whose preferences were given in Python. Raises InputError if it is neither, or the data is not
        what the run was begun with.
        """
        if not (Path(folder) / "config.yaml").is_file():
            if data is not None:
                raise InputError(
                    f"{folder} is no run folder, and what was saved only scores; go on where it was trained"
                )
            policy = load_reward(folder)
            return cls(policy, config=load_config(Path(folder) / SETTINGS), verbose=verbose)
        run = RunFolder.open(folder)
        config = run.config()
        if config.reward_model is None:
            raise InputError(f"{folder} is no reward model's run; open it with {config.opener}.load")
        if data is None and config.reward_model.data is None:
            raise InputError(
                f"{folder} was started from Python; go on there with its preferences: RewardModel.load(folder, data)"
            )
        run.hold()
        try:
            model = cls(config.policy.model, data, config=config, verbose=verbose, run=run)
            model._prepare_training()
        except BaseException:
            run.release()
            raise
        return model

    def _prepare_training(self) -> loop.Training:
        if self._training is None:
            if self.data is None:
                raise InputError(
                    "this reward model was saved and only scores; train one with RewardModel(model, data)"
                )
            self._training = build_training(self.config, self.policy, self.data, self._folder)
            self._folder = self._training.folder
        return self._training

    def _calibrate(self) -> None:
        """Shift and scale for the weights as they are, unless they were saved with them."""
        if self.data is None:
            return
        training = self._prepare_training()
        assert isinstance(training.rollout, PreferenceRollout)
        if self._calibrated_at != training.progress.updates:
            self._calibration = training.rollout.calibrate()
            self._calibrated_at = training.progress.updates


def _write_calibration(folder: Path, calibration: dict[str, Any]) -> None:
    """Leave the numbers and, where it can be drawn, their plot. Raises InputError if the disk does not take the numbers."""
    try:
        write_durably(folder / "calibration.json", json.dumps(calibration, indent=1).encode())
    except OSError as error:
        raise InputError(f"{folder / 'calibration.json'} could not be written: {error.strerror}") from error
    if importlib.util.find_spec("matplotlib") is None:
        return
    try:
        draw_calibration(folder / "calibration.png", calibration)
    except Exception as error:  # a drawing that fails, for whatever reason, must not cost the model
        print(f"surefoot: calibration.png could not be drawn: {error}", file=sys.stderr)


def draw_calibration(path: Path, calibration: dict[str, Any]) -> None:
    """Write a PNG: what people said over what was predicted, a point with its standard error for each bin."""
    from matplotlib.figure import Figure

    bins, of_pairs = calibration["bins"], calibration["kind"] == "pairs"
    predicted, observed = [row["predicted"] for row in bins], [row["observed"] for row in bins]
    figure = Figure(figsize=(5.6, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    ends = (0.5, 1.0) if of_pairs else (min(*predicted, *observed), max(*predicted, *observed))
    axes.plot(ends, ends, color="grey", linestyle="--", linewidth=1, label="perfect")
    errors = [row["standard_error"] for row in bins]
    axes.errorbar(
        predicted, observed, yerr=errors, fmt="o-", color="tab:blue", capsize=3, label="mean ± standard error"
    )
    axes.set_xlabel("predicted probability of the better text" if of_pairs else "predicted rating")
    axes.set_ylabel("share in which people agree" if of_pairs else "people's rating")
    count = int(sum(row["count"] for row in bins))
    kind = f"{calibration['texts']} {calibration['kind']}"
    axes.set_title(f"{count} {kind}, calibration error {calibration['calibration_error']:.3f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)

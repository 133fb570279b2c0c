"""`RewardModel`: a score for texts, learned from people's preferences."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surefoot.api.session import HasSession, Session, check_policy, open_folder, resume, supervised_config
from surefoot.build.language import build_policy, build_preferences, check_critic, load_reward
from surefoot.build.preflight import preflight
from surefoot.config import Config, setting_keys, with_settings
from surefoot.core.seeds import derived_seed
from surefoot.data.preferences import PreferenceDataset
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.policies.lm.reward_model import RewardModelPolicy
from surefoot.rollout.preferences import PreferenceRollout
from surefoot.storage.files import write_durably, writing
from surefoot.storage.run_folder import RunFolder


@with_settings(setting_keys("reward_model"))
class RewardModel(HasSession):
    """Learn to score texts as people judged them: `TextTask(prompts, RewardModel.load(folder))`.

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`,
    which is taken over; `data` a JSONL file, a list or a `datasets.Dataset` of pairs, `{"prompt"?, "chosen",
    "rejected", "margin"?}`, or of ratings, `{"prompt"?, "text" or "completion", "rating"}`. The score is read
    at the end token after the text.
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
        check_policy(policy, settings, CausalLMPolicy, RewardModelPolicy)
        self.config = supervised_config("reward_model", policy, None if run else data, config, settings)
        self._calibrated_at: int | None = None  # number of updates
        self._calibration: dict[str, Any] = {}
        self.data: PreferenceDataset | None = None
        if isinstance(policy, RewardModelPolicy):  # one that was saved: to score with
            self.policy = policy
        else:
            if run is None:
                preflight(self.config)
            self.data = build_preferences(self.config, data)
            trunk = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
            check_critic(trunk, self.config)
            self.policy = RewardModelPolicy(trunk, seed=derived_seed(self.config.seed, "reward head", 0))
        self._session = Session(self.config, self.policy, self.data, run=run, verbose=verbose)

    def learn(self, total_epochs: int | None = None, callback: Any = None) -> "RewardModel":
        """Train for `total_epochs` more passes over the preferences, or to the end that was asked for last.

        At the end `calibration.json` and, where matplotlib is installed, its plot `calibration.png` are in
        `run_folder` too. `callback` and what is raised: as in `SFT.learn`.
        """
        finish = self._write_calibration
        self._session.learn(total_epochs, "total_epochs", callback=callback, model=self, finish=finish)
        return self

    def evaluate(self, examples: int | None = None) -> dict[str, float]:
        """`eval/…` metrics on the first `examples` held-out preferences. Raises InputError without any."""
        return self._session.evaluate(examples, "examples")

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """One reward a completion: mean 0, std 1 over the held-out texts (without any, the training's).

        Prompts and completions are strings, which are read as one text, or message lists. Raises InputError
        for a text longer than the model's context.
        """
        self._calibrate()
        return self.policy.rewards(prompts, completions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """`score` with a reward function's signature."""
        return self.score(prompts, completions)

    def save(self, folder: str | Path) -> None:
        """Write what `task.reward` and `RewardModel.load` take. Raises InputError if it cannot be written."""
        self._calibrate()
        self._session.save(folder)

    @classmethod
    def load(
        cls, folder: str | Path, data: Any = None, *, verbose: int = 1, accept_changes: bool = False
    ) -> "RewardModel":
        """Go on from a run folder, or take what `save` wrote, to score with.

        `data` are the preferences where they were given in Python. Raises InputError for a folder of another
        kind, or data or a model that is not what the run was begun with, but for `accept_changes`.
        """
        config, run = open_folder(folder, "RewardModel", is_given=data is not None)
        if run is None:
            if data is not None:
                raise InputError(f"{folder} was saved and only scores; to train further, load its run folder")
            return cls(load_reward(folder), config=config, verbose=verbose)
        given: dict[str, Any] = {"config": config, "verbose": verbose, "accept_changes": accept_changes}
        return resume(run, cls, config.policy.model, data, **given)

    def _calibrate(self) -> None:
        """Shift and scale for the weights as they are, unless they were saved with them."""
        if self.data is None or self._calibrated_at == self._session.progress.updates:
            return
        rollout, _ = self._session.parts
        assert isinstance(rollout, PreferenceRollout)
        self._calibration = rollout.calibrate()
        self._calibrated_at = self._session.progress.updates

    def _write_calibration(self) -> None:
        """Leave the numbers and, where it can be drawn, their plot. Raises InputError if the disk is full."""
        self._calibrate()
        folder = self._session.training.folder.path
        with writing(folder / "calibration.json"):
            write_durably(folder / "calibration.json", json.dumps(self._calibration, indent=1).encode())
        if importlib.util.find_spec("matplotlib") is None:
            return
        try:
            draw_calibration(folder / "calibration.png", self._calibration)
        except Exception as error:  # a drawing that fails, for whatever reason, must not cost the model
            print(f"surefoot: calibration.png could not be drawn: {error}", file=sys.stderr)


def draw_calibration(path: Path, calibration: dict[str, Any]) -> None:
    """Write a PNG: what people said over what was predicted, a point with its standard error for each bin."""
    from matplotlib.figure import Figure

    bins, of_pairs = calibration["bins"], calibration["kind"] == "pairs"
    names, label = ("predicted", "observed", "standard_error"), "mean ± standard error"
    predicted, observed, errors = ([row[name] for row in bins] for name in names)
    figure = Figure(figsize=(5.6, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    ends = (0.5, 1.0) if of_pairs else (min(*predicted, *observed), max(*predicted, *observed))
    axes.plot(ends, ends, color="grey", linestyle="--", linewidth=1, label="perfect")
    axes.errorbar(predicted, observed, yerr=errors, fmt="o-", color="tab:blue", capsize=3, label=label)
    axes.set_xlabel("predicted probability of the better text" if of_pairs else "predicted rating")
    axes.set_ylabel("share in which people agree" if of_pairs else "people's rating")
    count, error = int(sum(row["count"] for row in bins)), calibration["calibration_error"]
    axes.set_title(f"{count} {calibration['texts']} {calibration['kind']}, calibration error {error:.3f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)

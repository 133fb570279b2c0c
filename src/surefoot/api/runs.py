"""The one door to a run: `start` a new one from its configuration, `resume` one from its folder, `finish` it.

Whatever starts runs comes through here: the command line, pipelines, the demo, recipes and benchmarks.
Nothing heavy is imported before a run's configuration is known to be one.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.config import Config
from surefoot.errors import InputError
from surefoot.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from surefoot.api.ppo import PPO
    from surefoot.api.rejection import RejectionSampling
    from surefoot.api.reward_model import RewardModel
    from surefoot.api.sft import SFT

    Run = PPO | SFT | RewardModel | RejectionSampling


def check(config: Config, *, where: str = "config") -> None:
    """Raise InputError for a configuration that is none of a run, but only of what Python adds to it."""
    if config.env is None and config.task is None and config.supervised is None:
        raise InputError(f"{where}: no task (task.prompts, task.reward) and no environment (env.id)")
    if config.sft is not None and config.sft.data is None:
        raise InputError(f"{where}: no examples to learn from; name a JSONL file as sft.data")
    if config.reward_model is not None and config.reward_model.data is None:
        raise InputError(f"{where}: no preferences to learn from; name a JSONL file as reward_model.data")


def start(config: Config, *, verbose: int = 1) -> Run:
    """The new run that `config` describes, not yet begun. Raises InputError for anything unusable."""
    check(config)
    opener = _opener(config)
    if config.rejection_sampling is not None:
        run: Run = opener(config, verbose=verbose)
    elif config.task is None:
        run = opener(config.policy.model, config=config, verbose=verbose)
    else:
        from surefoot.build.language import build_task
        from surefoot.build.preflight import preflight

        preflight(config)  # before prompts are fetched
        run = opener(config.policy.model, build_task(config), config=config, verbose=verbose)
    return run


def resume(folder: str | Path, *, verbose: int = 1) -> Run:
    """The run in `folder` at its newest whole checkpoint. Raises InputError for one that needs Python."""
    run: Run = _opener(RunFolder.open(folder).config()).load(folder, verbose=verbose)
    return run


def _opener(config: Config) -> Any:
    """The class that runs of this kind are opened with."""
    modules = {"PPO": "ppo", "SFT": "sft", "RewardModel": "reward_model", "RejectionSampling": "rejection"}
    return getattr(importlib.import_module(f"surefoot.api.{modules[config.opener]}"), config.opener)


def product(config: Config, folder: Path) -> Path:
    """What a finished run leaves in its `folder` for others: a model, or a file of examples."""
    return folder / ("model" if config.rejection_sampling is None else "completions.jsonl")


def finish(run: Run) -> Path:
    """Bring a run to its end and leave its product in its folder, unless both is done; the product.

    Raises what stopped it; where the user can fix that, saying how to go on.
    """
    if run.run_folder is not None and run.is_finished and product(run.config, run.run_folder).exists():
        return product(run.config, run.run_folder)
    try:
        run.learn()
    except InputError as error:
        saved = ("checkpoints/latest", "progress.json")
        if run.run_folder is not None and any((run.run_folder / name).exists() for name in saved):
            how = f"surefoot resume {shlex.quote(str(run.run_folder))}"
            raise InputError(f"{error}; the run is saved, once this is fixed go on with: {how}") from error
        raise
    assert run.run_folder is not None
    run.save(path := product(run.config, run.run_folder))
    return path

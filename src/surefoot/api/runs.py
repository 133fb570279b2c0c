"""The one door to a run: `start` a new one from its configuration, `resume` one from its folder, `finish` it.

Whatever starts runs comes through here: the command line, pipelines, the demo, recipes and benchmarks.
Nothing heavy is imported before a run's configuration is known to be one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

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
        raise InputError(
            f"{where}: no task (task.prompts and task.reward) and no environment (env.id); name one"
        )
    if config.sft is not None and config.sft.data is None:
        raise InputError(f"{where}: no examples to learn from; name a JSONL file as sft.data")
    if config.reward_model is not None and config.reward_model.data is None:
        raise InputError(f"{where}: no preferences to learn from; name a JSONL file as reward_model.data")


def start(config: Config, *, verbose: int = 1) -> Run:
    """The new run that `config` describes, not yet begun. Raises InputError for anything unusable."""
    check(config)
    if config.rejection_sampling is not None:
        from surefoot.api.rejection import RejectionSampling

        return RejectionSampling(config, verbose=verbose)
    if config.sft is not None:
        from surefoot.api.sft import SFT

        return SFT(config.policy.model, config=config, verbose=verbose)
    if config.reward_model is not None:
        from surefoot.api.reward_model import RewardModel

        return RewardModel(config.policy.model, config=config, verbose=verbose)
    from surefoot.api.ppo import PPO
    from surefoot.build.language import build_task
    from surefoot.build.preflight import preflight

    preflight(config)  # before prompts are fetched
    task = build_task(config) if config.env is None else None
    return PPO(config.policy.model, task, config=config, verbose=verbose)


def resume(folder: str | Path, *, verbose: int = 1) -> Run:
    """The run in `folder`, where its newest whole checkpoint left it.

    Raises InputError if it cannot go on from files alone.
    """
    config = RunFolder.open(folder).config()
    if config.rejection_sampling is not None:
        from surefoot.api.rejection import RejectionSampling

        return RejectionSampling.load(folder, verbose=verbose)
    if config.sft is not None:
        from surefoot.api.sft import SFT

        return SFT.load(folder, verbose=verbose)
    if config.reward_model is not None:
        from surefoot.api.reward_model import RewardModel

        return RewardModel.load(folder, verbose=verbose)
    from surefoot.api.ppo import PPO

    return PPO.load(folder, verbose=verbose)


def product(config: Config, folder: Path) -> Path:
    """What a run leaves in its `folder` for others to use, once it is finished: a model, or a file of
    examples.
    """
    return folder / ("model" if config.rejection_sampling is None else "completions.jsonl")


def finish(run: Run) -> Path:
    """Bring a run to its end and leave its product in its folder, unless both is done; the product.

    Raises what stopped it; where the user can fix that, saying how to go on.
    """
    if run.run_folder is not None and run.is_finished and product(run.config, run.run_folder).exists():
        return product(run.config, run.run_folder)
    from surefoot.api.rejection import RejectionSampling

    try:
        if isinstance(run, RejectionSampling):
            return run.sample()
        run.learn()
    except InputError as error:
        if run.run_folder is not None and _is_saved(run.run_folder):
            how = f"surefoot resume {shlex.quote(str(run.run_folder))}"
            raise InputError(f"{error}; the run is saved, once this is fixed go on with: {how}") from error
        raise
    assert run.run_folder is not None
    run.save(path := product(run.config, run.run_folder))
    return path


def _is_saved(folder: Path) -> bool:
    return (folder / "checkpoints" / "latest").exists() or (folder / "progress.json").exists()

"""The one door to a run: `start` a new one from its configuration, `resume` one from its folder, `finish` it.

Whatever starts runs comes through here: the command line, pipelines, the demo, recipes and benchmarks.
Nothing heavy is imported before a run's configuration is known to be one.
"""

import importlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.config import SUPERVISED, Config, load_config
from surefoot.config.messages import as_flag
from surefoot.errors import InputError
from surefoot.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from surefoot.api.ppo import PPO
    from surefoot.api.rejection import RejectionSampling
    from surefoot.api.reward_model import RewardModel
    from surefoot.api.supervised import DPO, SFT

    Run = PPO | SFT | RewardModel | DPO | RejectionSampling

# How long a run is, and what else may be another from some update on.
TOTALS = {"rollout.total_episodes", "env.total_timesteps", *(f"{name}.epochs" for name in SUPERVISED)}
RATES = {f"{section}.learning_rate" for section in ("ppo", "policy.critic", *SUPERVISED)}
CHANGEABLE = TOTALS | RATES | {"ppo.clip_range", "ppo.ent_coef", "ppo.n_epochs", "ppo.target_kl"}
CHANGEABLE |= {"evaluate.every", "run.checkpoint_every", "run.keep_checkpoints"}


def check(config: Config, *, where: str = "config", verb: str | None = None) -> None:
    """Raise InputError for a configuration without what runs of `verb`, by default its own, learn from."""
    section = (verb or config.verb).replace("-", "_")
    rows = config.examples if config.supervised == section else None
    if section in SUPERVISED and not (rows and rows.data):
        what = "examples" if section == "sft" else "preferences"
        raise InputError(f"{where}: no {what} to learn from; name a JSONL file as {section}.data")
    if not (section in SUPERVISED or config.env or config.task):
        raise InputError(f"{where}: no task (task.prompts, task.reward) and no environment (env.id)")


def start(config: Config) -> "Run":
    """The new run that `config` describes, not yet begun. Raises InputError for anything unusable."""
    from surefoot.build.language import build_task
    from surefoot.build.preflight import preflight

    check(config)
    preflight(config)  # before prompts are fetched
    source = None if config.task is None else build_task(config)
    return _opener(config)(config.policy.model, source, config=config)  # type: ignore[no-any-return]


def total_key(config: Config) -> str:
    """The field that says how long a run of this kind is."""
    section = config.supervised or ("env" if config.env is not None else "rollout")
    return next(key for key in TOTALS if key.startswith(f"{section}."))


def resume(
    folder: str | Path, *, accept_changes: bool = False, changes: Mapping[str, str] | None = None
) -> "Run":
    """The run in `folder` at its newest whole checkpoint.

    `changes` (dotted key -> YAML scalar) of `CHANGEABLE` fields are written to its config.yaml, with what was
    there before to history.jsonl. Raises InputError for one that needs Python, for other fields, or for
    inputs that have changed, unless that is to be accepted.
    """
    run = RunFolder.open(folder)
    config = run.config()
    opener, changes = _opener(config), changes or {}
    if changes:
        check(config, where=str(folder))
    total = total_key(config)
    allowed = CHANGEABLE - TOTALS | {total} if config.rejection_sampling is None else set()
    for key in changes.keys() - allowed:
        how = f"a run that has begun goes on with other {', '.join(sorted(CHANGEABLE))}"
        raise InputError(f"{as_flag(key)}: cannot change here; {how}; start a new run for the rest")
    changed = load_config(run.path / "config.yaml", changes)
    model = opener.load(folder, accept_changes=accept_changes)
    # Written is what the run can go on with, and first the total, which a checkpoint holds.
    if total in changes:
        model._session.set_total(changed)
    if changed != config:
        del model
        run.change(changed, changes)
        model = opener.load(folder, accept_changes=accept_changes)
    return model  # type: ignore[no-any-return]


def _opener(config: Config) -> Any:
    """The class that runs of this kind are opened with."""
    modules = {"PPO": "ppo", "RewardModel": "reward_model", "RejectionSampling": "rejection"}
    module = modules.get(config.opener, "supervised")
    return getattr(importlib.import_module(f"surefoot.api.{module}"), config.opener)


def product(config: Config, folder: Path) -> Path:
    """What a finished run leaves in its `folder` for others: a model, or a file of examples."""
    return folder / ("model" if config.rejection_sampling is None else "completions.jsonl")


def is_made(config: Config, folder: Path) -> bool:
    """Whether the product is there and whole: weights that are gone or half-written are written again."""
    made = product(config, folder)
    if config.rejection_sampling is not None:
        return made.is_file()
    from surefoot.build.preflight import SETTINGS
    from surefoot.policies.control.policy import WEIGHTS
    from surefoot.policies.lm.policy import CRITIC
    from surefoot.policies.lm.pretrained import REWARD, check_model_folder
    from surefoot.storage.safetensors import read_dtypes

    try:
        read_dtypes(made / (WEIGHTS if config.env else REWARD if config.reward_model else CRITIC))
        if config.env is None:
            check_model_folder(str(made))
    except InputError:
        return False
    return (made / SETTINGS).is_file()  # the last to be written


def finish(run: "Run") -> Path:
    """Bring a run to its end and leave its product in its folder; the product.

    Raises what stopped it; where the user can fix that, saying how to go on.
    """
    try:
        run.learn()
    except InputError as error:
        folder, saved = run.run_folder, ("checkpoints/latest", "progress.json")
        if folder is not None and any((folder / name).exists() for name in saved):
            how = f"surefoot resume {shlex.quote(str(folder))}"
            fixed = "once this is fixed (with --accept-changes if that changes its files) go on with"
            raise InputError(f"{error}; the run is saved, {fixed}: {how}") from error
        raise
    assert run.run_folder is not None
    run.save(path := product(run.config, run.run_folder))
    return path

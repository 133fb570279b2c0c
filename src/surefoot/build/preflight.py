"""What is known of a run before anything is loaded: its device, its models, and whether it can begin."""

import importlib.util
from collections.abc import Collection
from pathlib import Path

import torch

from surefoot.config import Config
from surefoot.data import assets
from surefoot.errors import InputError
from surefoot.policies.lm.pretrained import check_model_folder
from surefoot.storage.run_folder import RunFolder

# Written beside the weights by `save`, so that `load` gives back critic and settings too.
SETTINGS = "surefoot.yaml"


def build_device(name: str) -> str:
    """The device `config.device` means here. Raises InputError for one this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise InputError(f"device: {name} is not available here; use device: auto or cpu")
    return name


def preflight(config: Config) -> None:
    """Raise InputError for a new run's name or models, before anything is fetched or loaded."""
    RunFolder.check_free(config)
    for tracker in config.run.trackers:
        if importlib.util.find_spec(tracker) is None:
            how = f"pip install 'surefoot[{tracker}]', or leave it out"
            raise InputError(f"run.trackers: {tracker} is not installed; {how}")
    check_models(config)


def check_models(config: Config, *, made: Collection[str] = ()) -> None:
    """Raise InputError for a device that is not there, or models that neither are nor will be `made`."""
    build_device(config.device)
    models = {"policy.model": config.policy.model, "policy.critic.model": config.policy.critic.model}
    for key, model in models.items():
        if config.env is None and model is not None and model not in {*made, *assets.ASSETS}:
            check_model_folder(model if key == "policy.model" else model_of_run(model), key=key)


def model_of_run(folder: str) -> str:
    """The model's folder in a run folder, or `folder` itself."""
    return str(Path(folder) / "model") if (Path(folder) / "config.yaml").is_file() else folder

"""What is known of a run before anything is loaded: its device, its models' folders, and whether it can begin at all."""

from __future__ import annotations

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
    """What a new run can be refused for before anything is fetched or loaded: run name, device, model folder."""
    RunFolder.check_free(config)
    build_device(config.device)
    if config.env is None and config.policy.model not in assets.ASSETS:
        check_model_folder(config.policy.model)
        if (critic := config.policy.critic.model) is not None and critic not in assets.ASSETS:
            check_model_folder(model_of_run(critic), key="policy.critic.model")


def model_of_run(folder: str) -> str:
    """The model's folder in a run folder, or `folder` itself."""
    return str(Path(folder) / "model") if (Path(folder) / "config.yaml").is_file() else folder

"""A checkpoint of TRL's AutoModelForCausalLMWithValueHead as a model folder of ours, its critic beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from surefoot.build.preflight import SETTINGS
from surefoot.config import Config, PolicyConfig, dump_config
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CRITIC, load_policy
from surefoot.policies.lm.pretrained import check_model_folder
from surefoot.storage.files import whole_folder
from surefoot.storage.safetensors import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "v_head."
WRAPPER = "pretrained_model."  # before every other name where the wrapper's own parameters were saved
# What a model folder holds besides weights; nothing that is code or a pickle.
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
AS_SAFETENSORS = (
    "import torch; from safetensors.torch import save_file; "
    "save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, 'model.safetensors')"
)


def import_value_head(source: Path, output: Path) -> None:
    """Write `output`, a folder that `PPO.load` and `PPO(folder, task)` open: the same logits, the same values.

    TRL saves the head as `v_head.summary`, one linear layer [1, D] on the last hidden state, beside the model's weights; its
    dropout is left out. Raises InputError for pickles, adapters, folders without the head, links and weights that do not fit.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"--output {output}: exists; name a new folder")
    _check_source(source)
    tensors = {
        name.removeprefix(WRAPPER): tensor
        for file in _weights(source)
        for name, tensor in read_tensors(file).items()
    }
    critic = {name: tensors.pop(f"{HEAD}summary.{name}", None) for name in ("weight", "bias")}
    if critic["weight"] is None or critic["bias"] is None:
        raise InputError(
            f"{source}: no {HEAD}summary in its weights; without a value head it is a model as it is: policy.model"
        )
    try:
        with whole_folder(output) as aside:
            for pattern in BESIDE:
                for file in source.glob(pattern):
                    if file.name != INDEX:
                        shutil.copyfile(_own(file), aside / file.name)
            _write(
                aside,
                tensors,
                {name: tensor.float() for name, tensor in critic.items() if tensor is not None},
            )
            config = Config(policy=PolicyConfig(model=str(output.absolute())))
            (aside / SETTINGS).write_text(dump_config(config, exclude={"run"}), encoding="utf-8")
            # Opened once: what does not fit is said now.
            load_policy(str(aside), PolicyConfig(adapter=None, dtype="float32")).load_extras(aside)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{output} could not be written: {getattr(error, 'strerror', None) or error}"
        ) from error
    except InputError as error:
        raise InputError(str(error).replace(str(aside), str(source))) from error


def _weights(source: Path) -> list[Path]:
    """The files that hold the weights: those of the index where there is one, and no other shard that lies there."""
    if not (source / INDEX).is_file():
        return [_own(source / WEIGHTS)]
    names: dict[str, str] = json.loads(_own(source / INDEX).read_text())[
        "weight_map"
    ]  # sound: the folder was checked
    return [_own(source / name) for name in sorted(set(names.values()))]


def _own(file: Path) -> Path:
    """The file, if it is the folder's own: a link out of a folder of others would copy what they may not read."""
    if file.is_symlink():
        raise InputError(
            f"{file}: a link, which is not followed; where you trust the folder, copy it: cp -rL"
        )
    return file


def _write(folder: Path, tensors: dict[str, Tensor], critic: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    save_file({name: tensor.contiguous() for name, tensor in critic.items()}, folder / CRITIC)


def _check_source(source: Path) -> None:
    """Raise InputError for a folder that holds no whole, safe checkpoint, naming the way where there is one."""
    has_weights = (source / WEIGHTS).is_file() or (source / INDEX).is_file()
    if (source / "adapter_config.json").is_file():
        raise InputError(
            f"{source}: an adapter with its value head in a pickle; where TRL is, load it as TRL does, "
            "merge it (model.pretrained_model = model.pretrained_model.merge_and_unload(); model.is_peft_model = False) and "
            "save_pretrained it"
        )
    if not has_weights and (source / "pytorch_model.bin").is_file():
        raise InputError(
            f"{source}: pytorch_model.bin is a pickle and is not loaded, since loading one can run code; where you trust it, "
            f'in that folder: python -c "{AS_SAFETENSORS}"'
        )
    check_model_folder(str(source))

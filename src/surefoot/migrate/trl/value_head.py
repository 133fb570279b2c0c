"""A checkpoint of TRL's AutoModelForCausalLMWithValueHead as a model folder of ours, critic included."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from surefoot.build.preflight import SETTINGS
from surefoot.config import Config, PolicyConfig, dump_config
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CRITIC, load_policy
from surefoot.policies.lm.pretrained import check_model_folder
from surefoot.storage.files import whole_folder, writing
from surefoot.storage.safetensors import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "v_head.summary."
WRAPPER = "pretrained_model."  # before every other name where the wrapper's own parameters were saved
# What a model folder holds in addition to weights; nothing that is code or a pickle.
OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
_LOAD = "torch.load('pytorch_model.bin', weights_only=True)"
AS_SAFETENSORS = (
    "import torch; from safetensors.torch import save_file; "
    f"save_file({{k: v.clone() for k, v in {_LOAD}.items()}}, 'model.safetensors')"
)
MERGED = "model.pretrained_model = model.pretrained_model.merge_and_unload(); model.is_peft_model = False"


def import_value_head(source: Path, output: Path) -> None:
    """Write `output`, a folder that `PPO.load` opens in float32: the same logits, the same values.

    TRL's head is `v_head.summary`, a linear layer [1, D] on the last hidden state; its dropout is left out.
    Raises InputError for pickles, adapters, links, folders without the head and weights that do not fit.
    """
    _check(source)
    names = [WEIGHTS]
    if (source / INDEX).is_file():  # sound: the folder was checked; other shards that lie there are not read
        names = sorted(set(json.loads(_own(source / INDEX).read_text())["weight_map"].values()))
    read = [read_tensors(_own(source / name)) for name in names]
    tensors = {n.removeprefix(WRAPPER): tensor.contiguous() for part in read for n, tensor in part.items()}
    head = {name: tensors.pop(HEAD + name, None) for name in ("weight", "bias")}
    critic = {name: tensor.float() for name, tensor in head.items() if tensor is not None}
    if len(critic) < 2:
        raise InputError(f"{source}: no {HEAD}weight and bias; without a value head name it as policy.model")
    with writing(output), whole_folder(output) as aside:
        for file in (file for pattern in OTHERS for file in source.glob(pattern) if file.name != INDEX):
            shutil.copyfile(_own(file), aside / file.name)
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        save_file(critic, aside / CRITIC)
        settings = Config(policy=PolicyConfig(model=str(output.absolute()), dtype="float32"))
        (aside / SETTINGS).write_text(dump_config(settings, exclude={"run"}), encoding="utf-8")
        try:  # opened once: what does not fit is said now
            load_policy(str(aside), PolicyConfig(adapter=None, dtype="float32")).load_extras(aside)
        except InputError as error:
            raise InputError(str(error).replace(str(aside), str(source))) from error


def _own(file: Path) -> Path:
    """The file, unless it is a link: one out of a folder of others would copy what they may not read."""
    if file.is_symlink():
        raise InputError(f"{file}: a link, which is not followed; where you trust the folder: cp -rL")
    return file


def _check(source: Path) -> None:
    """Raise InputError for a folder that holds no whole, safe checkpoint, with the way where there is one."""
    if (source / "adapter_config.json").is_file():
        what = "an adapter whose value head is a pickle"
        raise InputError(f"{source}: {what}; in TRL, merge it ({MERGED}) and save it")
    is_safe = any((source / name).is_file() for name in (WEIGHTS, INDEX))
    if (source / "pytorch_model.bin").is_file() and not is_safe:
        what = "pytorch_model.bin is a pickle and is not loaded, since loading one can run code"
        raise InputError(f'{source}: {what}; where you trust it, in there: python -c "{AS_SAFETENSORS}"')
    check_model_folder(str(source))

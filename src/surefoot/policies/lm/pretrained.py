"""Models in folders: loaded if they are whole and safe, refused in one line otherwise."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, failing_as
from surefoot.storage.safetensors import read_dtypes

# Beside the weights of a reward model: its scalar head, and what its scores are shifted and scaled by.
REWARD = "surefoot_reward.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
DEQUANTIZED = ("fp8", "mxfp4")  # which transformers makes plain weights of
HAS_ADAPTER = (
    "there is an adapter in it (adapter_config.json); merge it into its model (merge_and_unload of peft), "
    "save that, and name its folder"
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def load_pretrained(source: str, *, dtype: torch.dtype, key: str = "policy.model") -> tuple[Any, Any]:
    """The transformers causal LM of a folder or hub id, on the CPU, and its tokenizer.

    Raises InputError, naming `key`, for what is not a causal LM, or not a whole one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if sys.flags.optimize > 1:
        raise InputError("python -OO leaves out docstrings, which transformers needs; run it without")
    importlib.import_module("surefoot.policies.lm.lstm")  # by which the Auto classes know it
    asked: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    asked["ignore_mismatched_sizes"] = True  # refused below, with their names
    safe, unable = {"trust_remote_code": False}, "that can be loaded"
    # What would be given beside hidden states; some implementations refuse to be asked for attentions.
    plain = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    with failing_as(f"{key} {source}: no configuration {unable}"):
        model_config = AutoConfig.from_pretrained(source, **plain, **safe)
        _check_quantization(model_config.to_dict(), f"{key} {source}")
    with failing_as(f"{key} {source}: no tokenizer {unable}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        tokenizer("")  # what its settings have of the wrong type shows when it is used
    with failing_as(f"{key} {source}: no causal language model {unable}"), silence_transformers():
        lm, report = AutoModelForCausalLM.from_pretrained(source, config=model_config, **asked, **safe)
    if getattr(lm, "_hf_peft_config_loaded", False):
        raise InputError(f"{key} {source}: {HAS_ADAPTER}")
    _check_quantization(lm.config.to_dict(), f"{key} {source}", undone=())
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise InputError(f"{key} {source}: {name} is {list(found)}, and config.json says {list(expected)}")
    if report["missing_keys"]:
        # transformers fills the gap with random numbers and goes on.
        missing = sorted(report["missing_keys"])
        found = f"{len(missing)} weights of the model are not in the folder, such as {missing[0]}"
        raise InputError(f"{key} {source}: {found}")
    for name, weights in lm.named_parameters():  # one that no text has come to yet would be saved again
        if weights.numel() and not all(bound.isfinite() for bound in weights.aminmax()):
            found = f"{name} has numbers that are infinite or NaN"
            raise InputError(f"{key} {source}: {found}; fetch or save the model again")
    return lm, tokenizer


def check_model_folder(source: str, *, key: str = "policy.model") -> None:
    """Raise InputError, naming `key`, if `source` looks like a folder and is not a whole, safe model."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise InputError(f"{key}: no folder {source}")
        return
    odd = [p.name for p in folder.iterdir() if p.exists() and not (p.is_file() or p.is_dir())]
    if odd:
        raise InputError(f"{key} {source}: {min(odd)} is a pipe or a device, which may never end; remove it")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{key} {source}: {HAS_ADAPTER}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{key} {source}: no config.json there; is it a whole model folder?")
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        again = "fetch or save the model again"
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{index}: damaged; {again}") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise InputError(f"{index}: names {outside[0]!r}, which is not in the folder; {again}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(f"{key} {source}: half-written, {missing[0]} is missing")
    elif not (folder / names[0]).is_file():
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern)]
        if pickles:
            raise InputError(
                f"{key} {source}: {pickles[0]} is a pickle and is not loaded, since that can run code; "
                "convert it to safetensors where you trust it (save_pretrained does)"
            )
        raise InputError(f"{key} {source}: no model.safetensors there; is it a whole model folder?")
    stored: dict[str, str] = {}
    for name in names:
        stored |= read_dtypes(folder / name)
    _check_described(folder, stored, f"{key} {source}")


def _check_described(folder: Path, stored: Mapping[str, str], where: str) -> None:
    """Raise InputError for weights that are none to train, or that a config of any size is not about."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        sections = [config, *filter(None, [config.get("text_config")])]
    except (ValueError, AttributeError, RecursionError):
        return  # refused when it is loaded
    _check_quantization(config, where)
    layers = [section[name] for section in sections for name in LAYERS if isinstance(section.get(name), int)]
    if layers and max(layers) > len(stored):  # building them would take longer than anybody waits
        found = f"config.json says {max(layers)} layers"
        raise InputError(f"{where}: {found}; the weights are {len(stored)} tensors")
    whole = [name for name, dtype in stored.items() if name.endswith("weight") and dtype not in FLOATS]
    if whole and not config.get("quantization_config"):
        found = f"{whole[0]} is stored as {stored[whole[0]]}, and config.json does not say how to read it"
        raise InputError(f"{where}: {found}; name the model it was made from")


def _check_quantization(config: Mapping[str, Any], where: str, undone: Sequence[str] = DEQUANTIZED) -> None:
    """Raise InputError for quantized weights, but in those ways that loading undoes."""
    for section in (config, config.get("text_config")):
        settings = section.get("quantization_config") if isinstance(section, dict) else None
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if settings and method not in undone:
            found = f"its weights are quantized ({method}), and cannot be trained"
            raise InputError(f"{where}: {found}; name the model that they were made from")

"""Models in folders: loaded if they are whole and safe, refused in one line otherwise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, one_line
from surefoot.storage.safetensors import check_safetensors

# Beside the weights of a reward model: its scalar head, and what its scores are shifted and scaled by.
REWARD = "surefoot_reward.safetensors"


def load_pretrained(source: str, *, dtype: torch.dtype, key: str = "policy.model") -> tuple[Any, Any]:
    """The transformers causal LM of a folder or hub id, on the CPU, and its tokenizer.

    Raises InputError, naming `key`, for what is not a causal LM, or not a whole one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    importlib.import_module("surefoot.policies.lm.lstm")  # by which the Auto classes know it
    asked: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    asked["ignore_mismatched_sizes"] = True  # refused below, with their names
    safe, part = {"trust_remote_code": False}, "configuration"
    try:
        model_config = AutoConfig.from_pretrained(source, **safe)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        part = "causal language model"
        with silence_transformers():
            lm, report = AutoModelForCausalLM.from_pretrained(source, config=model_config, **asked, **safe)
    except Exception as error:  # a broken folder can make transformers raise anything, a KeyError too
        raise InputError(f"{key} {source}: no {part} that can be loaded: {one_line(error)}") from error
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise InputError(f"{key} {source}: {name} is {list(found)}, and config.json says {list(expected)}")
    if report["missing_keys"]:
        # transformers fills the gap with random numbers and goes on.
        missing = sorted(report["missing_keys"])
        found = f"{len(missing)} weights of the model are not in the folder, such as {missing[0]}"
        raise InputError(f"{key} {source}: {found}")
    return lm, tokenizer


def check_model_folder(source: str, *, key: str = "policy.model") -> None:
    """Raise InputError, naming `key`, if `source` looks like a folder and is not a whole, safe model."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise InputError(f"{key}: no folder {source}")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{key} {source}: no config.json there; is it a whole model folder?")
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        again = "fetch or save the model again"
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{index}: damaged; {again}") from None
        if odd := [name for name in names if Path(name).name != name]:
            raise InputError(f"{index}: names {odd[0]!r}, which is not in the folder; {again}")
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
    for name in names:
        check_safetensors(folder / name)

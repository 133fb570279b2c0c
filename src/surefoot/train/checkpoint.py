"""Checkpoints that survive a kill at any moment.

    checkpoints/00000010/    policy.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/latest       name of the newest whole checkpoint
    checkpoints/best         name of the best one by the evaluation metric

A checkpoint is written to a folder aside on the same filesystem, every file is fsynced, the manifest (sizes and
SHA-256) comes last, then the folder is renamed and the pointer moved. Old ones go only after that. Nothing in it is a
pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surefoot.errors import InputError
from surefoot.policies.base import Policy
from surefoot.run import sync_folder, write_durably

FORMAT = 1


def save_checkpoint(
    folder: Path, number: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write checkpoint `number` (updates done): one safetensors file per entry of `tensors`, and `state` as JSON.

    Keeps the newest `keep` and the best. Raises InputError when the disk is full or not writable; older checkpoints
    are untouched then.
    """
    path, aside = folder / f"{number:08d}", folder / f"{number:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, contents in tensors.items():
            save_file(
                {key: value.detach().contiguous().cpu() for key, value in contents.items()}, aside / f"{name}.safetensors"
            )
        (aside / "state.json").write_text(json.dumps(state))
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(aside.iterdir())}
        for file in aside.iterdir():
            _sync_file(file)
        write_durably(aside / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
        if path.exists():  # the same update, saved before a resume: identical, and the new one is whole
            shutil.rmtree(path)
        os.replace(aside, path)
        sync_folder(folder)
        point(folder, "latest", path.name)
    except (OSError, RuntimeError) as error:  # safetensors raises its own error, a RuntimeError, when a write fails
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"the checkpoint {path} could not be written: {error}; older checkpoints are untouched") from error
    _remove_old(folder, keep)
    return path


def point(folder: Path, pointer: str, name: str) -> None:
    """Let `latest` or `best` name a checkpoint."""
    write_durably(folder / pointer, name.encode())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that passes its manifest, or None if there is none at all.

    Raises InputError if there are checkpoints but none of them is whole, naming the damaged file.
    """
    damaged: list[str] = []
    for path in _numbered(folder):
        problem = _problem(path)
        if problem is None:
            return path
        damaged.append(problem)
    if damaged:
        raise InputError(f"no whole checkpoint in {folder}: {damaged[0]}")
    return None


def pointed_checkpoint(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `best` or `latest` names, if there is one and it is whole."""
    try:
        name = (folder / pointer).read_text()
    except OSError:
        return None
    path = folder / name
    return path if path in _numbered(folder) and _problem(path) is None else None


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the state of a whole checkpoint. Raises InputError naming a file that is damaged."""
    problem = _problem(path)
    if problem is not None:
        raise InputError(f"damaged checkpoint: {problem}")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def policy_tensors(policy: Policy) -> dict[str, Tensor]:
    """What the policy trains, by name."""
    return {name: parameter.data for name, parameter in policy.named_parameters_to_train()}


@torch.no_grad()
def restore_policy(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved weights in. Raises InputError if names or shapes are not this policy's."""
    own = dict(policy.named_parameters_to_train())
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise InputError(f"the checkpoint does not fit this policy: {odd!r} is in only one of the two")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise InputError(
                f"the checkpoint does not fit this policy: {name!r} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


def optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as `<parameter>/<entry>`; empty before the first step."""
    return {
        f"{name}/{entry}": value
        for name, parameter in policy.named_parameters_to_train()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put Adam's state back, moments on the parameter's device."""
    parameters = dict(policy.named_parameters_to_train())
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        # Adam keeps its step counter on the CPU.
        optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)


def generator_states() -> dict[str, Any]:
    """Every global generator a reward function may draw from, as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), numpy.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encoded(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = [_encoded(state) for state in torch.cuda.get_rng_state_all()]
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Set the global generators as they were."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decoded(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_decoded(state) for state in states["cuda"]])


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _numbered(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit()), reverse=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{path} has format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / 'manifest.json'} is missing or damaged"
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            return f"{file} is damaged: its size or SHA-256 is not the manifest's"
    return None


def _remove_old(folder: Path, keep: int) -> None:
    best = pointed_checkpoint(folder, "best")
    for path in _numbered(folder)[keep:]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

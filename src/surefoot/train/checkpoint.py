"""Checkpoints that survive a kill at any moment.

    checkpoints/00000010/    policy.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/latest       name of the newest whole checkpoint
    checkpoints/best         name of the best one by the evaluation metric

A checkpoint is written to a folder aside on the same filesystem, every file is fsynced, the manifest (sizes
and SHA-256) comes last, then the folder is renamed and the pointer moved. Old ones go only after that.
Nothing in it is a pickle: tensors are safetensors, the rest is JSON.
"""

import base64
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from surefoot.errors import InputError
from surefoot.policies.base import Policy
from surefoot.storage.files import sha256, sync, write_durably, writing
from surefoot.storage.safetensors import read_tensors

FORMAT = 1
OPTIMIZER_STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "square_avg"})  # of Adam, of RMSprop
TensorsByName = Mapping[str, Tensor]


def save_checkpoint(
    folder: Path, number: int, *, tensors: Mapping[str, TensorsByName], state: Mapping[str, Any], keep: int
) -> Path:
    """Write checkpoint `number` (updates done): a safetensors file per entry of `tensors`, `state` as JSON.

    Keeps the newest `keep` and the best. Raises InputError when the disk is full or not writable; older
    checkpoints are untouched then.
    """
    path, aside = folder / f"{number:08d}", folder / f"{number:08d}.tmp"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        _write(aside, tensors, state)
        _put_in_place(aside, path)
        point(folder, "latest", path.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"the checkpoint {path} could not be written: {error}; older ones stand") from error
    _remove_old(folder, number, keep)
    return path


def settle(path: Path, keep: int) -> None:
    """Do what a kill may have kept `save_checkpoint` from doing once `path` stood."""
    if not path.name.endswith(".old"):  # that one stands in for its damaged new version
        point(path.parent, "latest", path.name)
        _remove_old(path.parent, number_of(path), keep)


def _write(aside: Path, tensors: Mapping[str, TensorsByName], state: Mapping[str, Any]) -> None:
    """Fill the folder `aside`, durably, the manifest last."""
    if aside.exists():  # a kill left it
        shutil.rmtree(aside)
    aside.mkdir()
    for name, contents in tensors.items():
        on_cpu = {key: value.detach().contiguous().cpu() for key, value in contents.items()}
        save_file(on_cpu, aside / f"{name}.safetensors")
    text = json.dumps(state, default=lambda values: values.tolist())  # arrays and tensors
    (aside / "state.json").write_text(text)
    files = {}
    for file in sorted(aside.iterdir()):
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    write_durably(aside / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def _put_in_place(aside: Path, path: Path) -> None:
    """Name a whole checkpoint; one that has the name (saved before a resume) steps aside until it stands."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        if _is_whole(path):
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        else:
            shutil.rmtree(path)
    os.replace(aside, path)
    sync(path.parent)


def point(folder: Path, pointer: str, name: str) -> None:
    """Let `latest` or `best` name a checkpoint, unless it does."""
    if (path := _pointed(folder, pointer)) is not None and path.name == name:
        return
    with writing(folder / pointer, f"; {name} is whole"):
        write_durably(folder / pointer, name.encode())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that passes its manifest, or None if there is none at all.

    Names a newer one that is damaged on stderr. Raises InputError, naming a file, if none of them is whole.
    """
    damage: InputError | None = None  # of the newest
    for path in _numbered(folder):
        try:
            check(path)
        except InputError as error:
            damage = damage or error
            continue
        if damage:
            print(f"surefoot: {damage}; using the older {path.name}", file=sys.stderr)
        return path
    if damage:
        raise InputError(f"no whole checkpoint in {folder}: {damage}")
    return None


def number_of(path: Path) -> int:
    """Updates done when the checkpoint was written."""
    return int(path.name.removesuffix(".old"))


def pointed_checkpoint(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `best` or `latest` names, if there is one and it is whole."""
    path = _pointed(folder, pointer)
    return path if path is not None and _is_whole(path) else None


def check(path: Path) -> list[str]:
    """File names of a whole checkpoint. Raises InputError naming the file that is missing or damaged."""
    manifest = path / "manifest.json"
    try:
        contents = json.loads(manifest.read_bytes() if manifest.is_file() else b"")  # a pipe may never end
        if contents["format"] != FORMAT:
            raise InputError(f"{manifest} has format {contents['format']!r}; this version reads {FORMAT}")
        listed = contents["files"].items()
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{manifest} is missing or damaged") from None
    for name in sorted(files.keys() | {"state.json"}):
        file = path / name
        if name not in files or name in {"..", ""} or Path(name).name != name:
            raise InputError(f"{manifest} is damaged: it lists {sorted(files)}")
        if not file.is_file() or file.is_symlink():
            raise InputError(f"{file} is missing")
        if (file.stat().st_size, sha256(file)) != files[name]:
            raise InputError(f"{file} is damaged: its size or SHA-256 is not the manifest's")
    return sorted(files)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the state of a whole checkpoint. Raises InputError naming a damaged file."""
    files = [path / name for name in check(path) if name.endswith(".safetensors")]
    tensors = {file.stem: read_tensors(file) for file in files}
    try:
        state = json.loads((path / "state.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / 'state.json'} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path / 'state.json'} is a {type(state).__name__}, not an object")
    return tensors, state


def check_like(value: Any, example: Any, where: str) -> None:
    """Raise InputError, naming the place, unless `value` has what `example` has, of the same kinds.

    Where the example has None, or nothing, anything may be; numbers that are whole must be whole.
    """
    example = example.tolist() if hasattr(example, "tolist") else example
    kind: Any = (int, float) if type(example) is float else list if type(example) is tuple else type(example)
    if example is None:
        return
    if not isinstance(value, kind) or isinstance(value, bool) is not isinstance(example, bool):
        raise InputError(f"{where} is {value!r:.60}, not such as {example!r:.60}; the checkpoint is damaged")
    if kind is dict:
        for key, inner in example.items():
            check_like(value.get(str(key)), inner, f"{where}, {key}")
    elif kind is list and example:
        for i, inner in enumerate(value):
            check_like(inner, example[i if len(value) == len(example) else 0], f"{where}, {i}")


def check_inputs(path: Path, then: Mapping[str, str], now: Mapping[str, str], *, accept: bool) -> None:
    """Raise InputError naming the inputs whose digests have changed, unless that is to be accepted."""
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if changed and not accept:
        how = "put it back, or go on with the change by --accept-changes (in Python accept_changes=True)"
        raise InputError(f"{path}: {', '.join(changed)}: not what the run began with; {how}")


def policy_tensors(policy: Policy) -> dict[str, Tensor]:
    """What the policy trains, by name."""
    return {name: parameter.data for name, parameter in policy.named_parameters_to_train()}


@torch.no_grad()
def restore_policy(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved weights in. Raises InputError, before anything is copied, if they are not this policy's."""
    own = dict(policy.named_parameters_to_train())
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise InputError(f"the checkpoint does not fit this policy: {odd[0]!r} is in only one of the two")
    for name, parameter in own.items():
        _check_fit(name, tensors[name], parameter)
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def optimizer_tensors(policy: Policy, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<entry>`; empty before the first step."""
    return {
        f"{name}/{entry}": value
        for name, parameter in policy.named_parameters_to_train()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(policy: Policy, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put its state back, moments on the parameter's device. Raises InputError if it does not fit."""
    parameters = dict(policy.named_parameters_to_train())
    states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        states[name][entry] = value
    wanted = OPTIMIZER_STATES[isinstance(optimizer, torch.optim.RMSprop)]
    for name, state in states.items():
        if name not in parameters or state.keys() != wanted:
            found = f"{name!r} has {sorted(state)}"
            raise InputError(f"the checkpoint's optimizer does not fit this policy: {found}")
        for entry in wanted - {"step"}:
            _check_fit(f"{name}/{entry}", state[entry], parameters[name])
    optimizer.state.clear()
    for name, state in states.items():
        # Moments lie in memory as the parameter does, channels last or not: the fused step goes by that order
        # alone. An optimizer keeps its step counter on the CPU.
        optimizer.state[parameters[name]] = {
            entry: value if entry == "step" else torch.empty_like(parameters[name]).copy_(value)
            for entry, value in state.items()
        }


def _check_fit(name: str, *tensors: Tensor) -> None:
    saved, own = (f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)
    if saved != own:
        raise InputError(f"the checkpoint does not fit this policy: {name!r} is {saved}, not {own}")


def seed_generators(seed: int) -> None:
    """Start the global generators, which a reward function may draw from."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """Every global generator a reward function may draw from, as JSON."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": _encoded(torch.get_rng_state())}
    kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    states["numpy"] = [str(kind), numpy.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    if torch.cuda.is_available():
        states["cuda"] = [_encoded(state) for state in torch.cuda.get_rng_state_all()]
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Set the global generators as they were."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decoded(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())  # there may be fewer than before
        saved = [_decoded(state) for _, state in zip(devices, states["cuda"], strict=False)]
        torch.cuda.set_rng_state_all(saved)


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _numbered(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that steps aside for its new version comes after that."""
    named = [p for p in folder.glob("[0-9]*") if re.fullmatch(r"\d{8,}(\.old)?", p.name)]
    found = [p for p in named if p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: (-number_of(p), p.name))


def _pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that a pointer names, unchecked; only what lies in this folder can be named."""
    try:
        name = path.read_text() if (path := folder / pointer).is_file() else ""
    except (OSError, ValueError):
        return None
    return next((path for path in _numbered(folder) if path.name == name), None)


def _is_whole(path: Path) -> bool:
    try:
        check(path)
    except InputError:
        return False
    return True


def _remove_old(folder: Path, number: int, keep: int) -> None:
    """Remove all but the newest `keep` up to `number` and the best, and what kills left."""
    best = _pointed(folder, "best")
    numbered = [path for path in _numbered(folder) if number_of(path) <= number]
    standing = [path for path in numbered if not path.name.endswith(".old")]
    leftovers = [path for path in folder.iterdir() if path.name.endswith((".old", ".tmp"))]
    for path in (*standing[keep:], *leftovers):
        if path != best:
            shutil.rmtree(path, ignore_errors=True)

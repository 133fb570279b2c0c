"""What a run depends on in addition to its configuration: a digest by key, to compare at a resume."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from surefoot.build.preflight import model_of_run
from surefoot.config import Config
from surefoot.rewards.functions import is_function
from surefoot.storage.files import sha256


def code_inputs(config: Config) -> dict[str, str]:
    """Digests of the functions' files and the reward models that a configuration names.

    With a file go the modules beside it that it imports. What is given in Python has no digest.
    """
    named: dict[str, str | None] = {}
    if (task := config.task) is not None:
        parts = [] if isinstance(task.reward, str) else task.reward
        named = {"task.reward": task.reward} if isinstance(task.reward, str) else {}
        named |= {f"task.reward {part.called}": part.name for part in parts} | {"task.metric": task.metric}
    if config.env is not None and is_function(config.env.id or ""):
        named["env.id"] = config.env.id
    return {key: _digest(name) for key, name in named.items() if name is not None}


def _digest(name: str) -> str:
    """Of a reward model's folder its weights and settings, of a function its code."""
    if Path(name).is_dir():
        folder = Path(model_of_run(name))
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
    else:
        place = name.rpartition(":")[0]
        spec = None if place.endswith(".py") else importlib.util.find_spec(place)
        files = sorted(set(_code(Path(spec.origin if spec and spec.origin else place), set())))
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()


def _code(file: Path, seen: set[Path]) -> Iterator[Path]:
    """A file and, of the modules that it imports, those beside it."""
    if file in seen or not file.is_file():
        return
    seen.add(file)
    yield file
    for node in ast.walk(ast.parse(file.read_bytes() if file.suffix == ".py" else b"")):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        for beside in (file.parent.joinpath(*name.split(".")) for name in names):
            yield from _code(beside.with_suffix(".py"), seen)
            yield from _code(beside / "__init__.py", seen)

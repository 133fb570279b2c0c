"""Reward functions: finding them by name, calling them, and not trusting what they return."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from surefoot.config.messages import short
from surefoot.data.user_code import Guard
from surefoot.errors import InputError
from surefoot.types import Trajectory

LARGEST_REWARD = 1e15  # beyond, squares of returns and sums of them leave float32


class RewardFunction(Protocol):
    """Plain Python, with the signature TRL users already have."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Sequence[float]:
        """One float per completion.

        Prompts and completions are strings, or message lists where the prompt was one; each further column of
        the task comes as a keyword, a list with one entry a sample.
        """


def is_function(reference: str) -> bool:
    """Whether a name has the form of `load_function`; a Gymnasium id such as `package:Maze-v0` has not."""
    place, _, name = reference.rpartition(":")
    return bool(place) and name.isidentifier()


def load_function(reference: str, *, key: str) -> RewardFunction:
    """The function named `file.py:function` or `package.module:function`. InputError names `key`."""
    if not is_function(reference):
        forms = "'file.py:function' or 'package.module:function'"
        raise InputError(f"{key}: expected {forms}, got {reference!r}")
    place, _, name = reference.rpartition(":")
    path, is_file = Path(place), place.endswith(".py")
    if is_file and not path.is_file():
        raise InputError(f"{key}: no file {place}")
    # Its folder, or for a module the working directory, as if it were run there: siblings can be imported.
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    with Guard(f"{key}: {place}", "cannot be imported:"):
        module = _executed(path) if is_file else importlib.import_module(place)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{key}: {place} has no function {name!r}")
    return cast(RewardFunction, function)


def _executed(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"surefoot_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute_rewards(
    function: RewardFunction, trajectories: Sequence[Trajectory], *, name: str = "reward"
) -> list[float]:
    """What `function` gives for the trajectories, one finite float for each.

    Raises InputError for a function that raises, returns the wrong count, or anything but finite numbers; the
    message names the sample.
    """
    samples: dict[str, list[Any]] = {
        "prompts": [_copied(t.prompt) for t in trajectories],
        "completions": [_completion(t) for t in trajectories],
    }
    for column in sorted({column for t in trajectories for column in t.columns}):
        samples[column] = [_copied(t.columns.get(column)) for t in trajectories]
    count = len(trajectories)
    with Guard(f"the {name} function", called_with=", ".join(samples)):
        rewards = function(**samples)
        # Of a dict the keys would be taken for rewards, a set has no order, and a 0-d array no length.
        is_list = hasattr(rewards, "__len__") and not isinstance(rewards, (str, bytes, Mapping, Set))
        if not is_list or getattr(rewards, "shape", None) == ():
            found = f"the {name} function returned {short(rewards)}"
            raise InputError(f"{found}; a list of {count} floats is needed")
        if len(rewards) != count:
            raise InputError(f"the {name} function returned {len(rewards)} rewards for {count} completions")
        return [_checked(value, i, trajectories[i], name) for i, value in enumerate(rewards)]


def _copied(value: Any) -> Any:
    """A prompt or a column's value to hand out: whatever is done to it, the task keeps its own."""
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, a connection: there is but one
        return value


def _completion(trajectory: Trajectory) -> Any:
    text = trajectory.completion_text
    return text if isinstance(trajectory.prompt, str) else [{"role": "assistant", "content": text}]


def _checked(value: Any, index: int, trajectory: Trajectory, name: str) -> float:
    try:
        number = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
        if isinstance(number, (int, float)) and abs(number) <= LARGEST_REWARD:  # nor is NaN
            return float(number)
    except (OverflowError, RuntimeError, ValueError):  # an int beyond all floats; an array of several numbers
        pass
    raise InputError(
        f"the {name} function returned {short(value)} for sample {index} (prompt {short(trajectory.prompt)}, "
        f"completion {short(trajectory.completion_text)}); a float of at most ±{LARGEST_REWARD:g} is needed"
    )

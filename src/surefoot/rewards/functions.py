"""Reward functions: finding them by name, calling them, and not trusting what they return."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol, cast

from surefoot.config.messages import short
from surefoot.errors import InputError
from surefoot.types import Trajectory


class RewardFunction(Protocol):
    """Plain Python, with the signature TRL users already have.

    Prompts and completions are strings, or message lists where the prompt was one; each further column of the
    task comes as a keyword, a list with one entry a sample.
    """

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **columns: list[Any]
    ) -> Sequence[float]:
        """One float per completion."""
        ...


def is_function(reference: str) -> bool:
    """Whether a name has the form of `load_function`; a Gymnasium id such as `package:Maze-v0` has not."""
    place, _, name = reference.rpartition(":")
    return bool(place) and name.isidentifier()


def load_function(reference: str, *, key: str) -> RewardFunction:
    """The function named `file.py:function` or `package.module:function`. InputError names `key`."""
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise InputError(
            f"{key}: expected 'file.py:function' or 'package.module:function', got {reference!r}"
        )
    # Its folder, or for a module the working directory, as if it were run there: siblings can be imported.
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise InputError(f"{key}: no file {place}")
        spec = importlib.util.spec_from_file_location(f"surefoot_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (
            Exception,
            SystemExit,
        ) as error:  # a script that ends itself must not end the run, and with code 0
            raise InputError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise InputError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{key}: {place} has no function {name!r}")
    return cast(RewardFunction, function)


def compute_rewards(
    function: RewardFunction, trajectories: Sequence[Trajectory], *, name: str = "reward"
) -> list[float]:
    """Call `function` on the trajectories and return one finite float for each.

    Raises InputError for a function that raises, returns the wrong count, or anything but finite numbers; the
    message names the sample.
    """
    prompts = [t.prompt for t in trajectories]
    completions = [
        t.completion_text
        if isinstance(t.prompt, str)
        else [{"role": "assistant", "content": t.completion_text}]
        for t in trajectories
    ]
    columns: dict[str, list[Any]] = {
        column: [t.columns.get(column) for t in trajectories]
        for column in sorted({c for t in trajectories for c in t.columns})
    }
    folder = os.getcwd()
    try:
        rewards = function(prompts=prompts, completions=completions, **columns)
    except InputError:  # a reward model's, which says in one line what is wrong
        raise
    except (Exception, SystemExit) as error:
        where = (
            _where_raised(error)
            or f"; it is called with the keywords {', '.join(('prompts', 'completions', *columns))}"
        )
        raise InputError(f"the {name} function raised {type(error).__name__}: {error}{where}") from error
    finally:
        os.chdir(folder)  # relative paths of the run must go on meaning the same
    # Of a dict the keys would be taken for rewards, and a set has no order; an array of no dimension has no
    # length.
    if (
        isinstance(rewards, (str, bytes, Mapping, Set))
        or not hasattr(rewards, "__len__")
        or getattr(rewards, "shape", None) == ()
    ):
        raise InputError(
            f"the {name} function returned {short(rewards)}; a list of {len(prompts)} floats is needed"
        )
    if len(rewards) != len(prompts):
        raise InputError(
            f"the {name} function returned {len(rewards)} rewards for {len(prompts)} completions"
        )
    return [_checked(value, i, trajectories[i], name) for i, value in enumerate(rewards)]


def _checked(value: Any, index: int, trajectory: Trajectory, name: str) -> float:
    try:
        number = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
        if isinstance(number, (int, float)) and math.isfinite(number):
            return float(number)
    except (OverflowError, RuntimeError, ValueError):  # an int beyond all floats; an array of several numbers
        pass
    raise InputError(
        f"the {name} function returned {short(value)} for sample {index} (prompt {short(trajectory.prompt)}, "
        f"completion {short(trajectory.completion_text)}); a finite float is needed"
    )


def _where_raised(error: BaseException) -> str:
    """The last line of user code in the traceback, to find the bug without reading a stack."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or frame.tb_frame.f_code.co_filename == __file__:  # it could not be called at all
        return ""
    return f" ({frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno})"

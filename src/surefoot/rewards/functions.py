"""Reward functions: finding them by name, calling them, and not trusting what they return."""

import asyncio
import contextlib
import copy
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Awaitable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, cast

from surefoot.config.messages import short
from surefoot.config.task import LABEL
from surefoot.data.user_code import Guard
from surefoot.errors import InputError
from surefoot.types import Trajectory

LARGEST_REWARD = 1e15  # beyond, squares of returns and sums of them leave float32


class RewardFunction(Protocol):
    """Plain Python, with the signature TRL users already have."""

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
        """One float per completion; None where it does not apply to one. May be `async`.

        Prompts and completions are strings, or message lists where the prompt was one; each further column of
        the task comes as a keyword, a list with one entry a sample. A function that names them also gets
        `completion_ids`, the completions' tokens, and those of `RewardLog`.
        """


@dataclass
class RewardLog:
    """What reward functions may say beside rewards, by the keywords that TRL's have.

    `log_metric(name, value)` logs a number, `log_extra(column, values)` a value for each sample;
    `trainer_state.global_step` is the number of updates before this one.
    """

    global_step: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)  # by name, as each call gave them

    def offers(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """The keywords, for a function that scores `trajectories`."""

        def log_metric(name: str, value: Any) -> None:
            number = float(value)
            if not (math.isfinite(number) and re.fullmatch(LABEL, name)):
                what = "a name of letters, digits, '.', '_' and '-' and a finite number are needed"
                raise InputError(f"log_metric({name!r}, {value}): {what}")
            self.metrics.setdefault(name, []).append(number)

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != len(trajectories):
                what = f"{len(values)} values for {len(trajectories)} completions"
                raise InputError(f"log_extra({column!r}, …): {what}")
            for trajectory, value in zip(trajectories, values, strict=True):
                is_plain = value is None or isinstance(value, (str, bool, int, float))
                trajectory.extra[str(column)] = value if is_plain else str(value)

        return {
            "completion_ids": [[*t.completion_tokens] for t in trajectories],
            "trainer_state": SimpleNamespace(global_step=self.global_step),
            "log_metric": log_metric,
            "log_extra": log_extra,
        }

    def means(self, metric: str) -> dict[str, float]:
        """The logged numbers, called `metric` with their names put in for `<name>`."""
        means = {name: math.fsum(values) / len(values) for name, values in self.metrics.items()}
        return {metric.replace("<name>", name): mean for name, mean in means.items()}


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
    """A file's module, by the name that other processes import it by, if that is not another's."""
    found = None
    if file.stem.isidentifier():
        with contextlib.suppress(ValueError):  # `__main__` has no spec
            found = importlib.util.find_spec(file.stem)
    is_free = found is not None and found.origin == str(file.resolve())
    name = file.stem if is_free else f"surefoot_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # else it would be found half-made
        raise
    return module


def compute_rewards(
    function: RewardFunction,
    trajectories: Sequence[Trajectory],
    *,
    name: str = "reward",
    log: RewardLog | None = None,
) -> list[float]:
    """What `function` gives for the trajectories, a finite float for each, or NaN where it gave None.

    Raises InputError for a function that raises, returns the wrong count, or anything but finite numbers; the
    message names the sample.
    """
    return compute_several({name: function}, trajectories, log or RewardLog())[name]


def compute_several(
    functions: Mapping[str, RewardFunction], trajectories: Sequence[Trajectory], log: RewardLog
) -> dict[str, list[float]]:
    """As `compute_rewards`, of several by their names; those that are `async` wait at the same time."""
    returned: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            keywords = _keywords(function, trajectories, log)
            with Guard(f"the {name} function", called_with=", ".join(keywords)):
                returned[name] = function(**keywords)
            if inspect.iscoroutine(returned[name]):  # which another's error may keep from being awaited
                stack.callback(returned[name].close)
        waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
        if waiting:
            with Guard("the event loop of the reward functions"):
                returned |= zip(waiting, _outcomes(list(waiting.values())), strict=True)
    return {name: _floats(value, trajectories, name) for name, value in returned.items()}


def _keywords(function: RewardFunction, trajectories: Sequence[Trajectory], log: RewardLog) -> dict[str, Any]:
    """What a function is called with: samples, columns, and what it names of what is offered."""
    samples: dict[str, list[Any]] = {
        "prompts": [_copied(t.prompt) for t in trajectories],
        "completions": [_completion(t) for t in trajectories],
    }
    for column in sorted({column for t in trajectories for column in t.columns}):
        samples[column] = [_copied(t.columns.get(column)) for t in trajectories]
    try:
        named = inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):  # one written in C has none
        return samples
    offers = log.offers(trajectories)
    return {name: offers[name] for name in offers.keys() & named} | samples


def _outcomes(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each gives, or the exception it ends by; a notebook's own event loop may be running."""

    async def together() -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(together())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, together()).result()


def _floats(returned: Any, trajectories: Sequence[Trajectory], name: str) -> list[float]:
    count = len(trajectories)
    with Guard(f"the {name} function", called_with="those of a reward function"):
        if isinstance(returned, BaseException):
            raise returned
        # Of a dict the keys would be taken for rewards, a set has no order, and a 0-d array no length.
        is_list = hasattr(returned, "__len__") and not isinstance(returned, (str, bytes, Mapping, Set))
        if not is_list or getattr(returned, "shape", None) == ():
            found = f"the {name} function returned {short(returned)}"
            raise InputError(f"{found}; a list of {count} floats is needed")
        if len(returned) != count:
            raise InputError(f"the {name} function returned {len(returned)} rewards for {count} completions")
        return [_checked(value, i, trajectories[i], name) for i, value in enumerate(returned)]


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
    if value is None:
        return math.nan
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

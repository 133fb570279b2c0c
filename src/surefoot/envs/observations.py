"""Observations by name: the leaves of their space, one of them or many, and what is checked in each step."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy
from gymnasium import spaces
from numpy.typing import NDArray

from surefoot.errors import InputError
from surefoot.types import ACTION_MASK, OBSERVATION

Arrays = dict[str, NDArray[Any]]


def leaves(space: spaces.Space[Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of an observation space by name, nested ones as `outer.inner`.

    Raises InputError for other containers than Dict.
    """
    if isinstance(space, spaces.Dict):
        parts = {f"{prefix}{name}": part for name, part in space.spaces.items()}
        return {name: leaf for key, part in parts.items() for name, leaf in leaves(part, f"{key}.").items()}
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        kind = type(space).__name__
        raise InputError(
            f"env: the observation space {kind} is not supported; Box, Discrete, MultiDiscrete, MultiBinary "
            "and Dict are (gymnasium.wrappers.FlattenObservation makes a Box of most others)"
        )
    return {prefix.removesuffix(".") or OBSERVATION: space}


def flat(observations: Any, prefix: str = "") -> dict[str, Any]:
    """Values as `leaves` names them."""
    if not isinstance(observations, Mapping):
        return {prefix.removesuffix(".") or OBSERVATION: observations}
    return {
        name: leaf
        for key, part in observations.items()
        for name, leaf in flat(part, f"{prefix}{key}.").items()
    }


def batched(spaces_by_name: Mapping[str, Any], observation: Any, masks: Any = None) -> tuple[Arrays, bool]:
    """One observation or N, with `masks` [A] or [N, A], as arrays [N, ...] by name; and whether it was one.

    Raises InputError for a shape that is neither.
    """
    arrays = {name: numpy.asarray(values) for name, values in flat(observation).items()}
    if masks is not None:
        arrays[ACTION_MASK] = numpy.asarray(masks)
    expected = {name: space for name, space in spaces_by_name.items() if name != ACTION_MASK}
    if missing := sorted(expected.keys() - arrays.keys()):
        raise InputError(f"predict: the observation lacks {missing[0]!r}")
    first = next(iter(expected))
    is_one = arrays[first].shape == expected[first].shape
    if is_one:
        arrays = {name: values[None] for name, values in arrays.items()}
    for name, space in expected.items():
        if arrays[name].shape != (len(arrays[first]), *space.shape):
            shape, one = list(arrays[name].shape[is_one:]), list(space.shape)
            raise InputError(
                f"predict: the observation {name} has shape {shape}; one is {one}, N are {['N', *one]}"
            )
    if ACTION_MASK in spaces_by_name:
        given, wanted = arrays.get(ACTION_MASK), (len(arrays[first]), *spaces_by_name[ACTION_MASK].shape)
        if given is None or given.shape != wanted:
            shape = list(wanted[is_one:])
            raise InputError(f"predict: this policy was trained with action masks; give action_masks {shape}")
        arrays[ACTION_MASK] = given.astype(bool)
    return arrays, is_one


class Checks:
    """What must hold of every observation [N, ...] by name; call it with them.

    Raises InputError for values that are not finite, counts outside their space and masks without a legal
    action. Box values beyond their bounds are warned of once and used: published environments have them.
    """

    def __init__(
        self, spaces_by_name: Mapping[str, Any], action_space: Any, *, name: str, where: str = "env"
    ):
        self.spaces, self.action_space, self.name, self.where = spaces_by_name, action_space, name, where
        self.row = "sub-environment" if where == "env" else "row"
        if ACTION_MASK in spaces_by_name:
            _check_mask_space(spaces_by_name[ACTION_MASK], action_space)
        self._bounded = {n: space for n, space in spaces_by_name.items() if _can_be_exceeded(space)}

    def __call__(self, arrays: Arrays, is_over: NDArray[numpy.bool_] | None = None) -> None:
        """Check all; where `is_over` [N], no action need be legal."""
        self.are_finite(arrays)
        for name, values in arrays.items():
            if name == ACTION_MASK:
                self._check_mask(values, is_over)
            elif not _are_counts_within(self.spaces[name], values):
                space = self.spaces[name]
                raise InputError(f"{self.where}: the observation {name} lies outside its space {space}")
            elif name in self._bounded:
                self._warn_of_bounds(name, values)

    def are_finite(self, arrays: Arrays) -> None:
        """Check that alone."""
        for name, values in arrays.items():
            # The sum first: one number to look at, and where it is finite so are all the others.
            if values.dtype.kind != "f" or math.isfinite(values.sum()):
                continue
            finite = numpy.isfinite(values.reshape(len(values), -1)).all(1)
            if not finite.all():
                place = f"{self.row} {int(numpy.argmin(finite))}"
                raise InputError(
                    f"{self.where}: the observation {name} of {place} is not finite; fix the environment"
                )

    def _check_mask(self, masks: NDArray[Any], is_over: NDArray[numpy.bool_] | None) -> None:
        if masks.ndim != 2 or masks.shape[1] != mask_width(self.action_space):
            raise InputError(_mask_shape(self.where, "action masks have", masks.shape[1:], self.action_space))
        can_act = numpy.all([choice.any(-1) for choice in choices(self.action_space, masks)], axis=0)
        if is_over is not None:
            can_act |= is_over
        if not can_act.all():
            place = f"{self.row} {int(numpy.argmin(can_act))}"
            raise InputError(
                f"{self.where}: {place} has no legal action in its action_mask; end the episode there"
            )

    def _warn_of_bounds(self, name: str, values: NDArray[Any]) -> None:
        """Warn once of values beyond the bounds of their Box; they are used as they are."""
        space = self._bounded[name]
        if ((values < space.low) | (values > space.high)).any():
            del self._bounded[name]
            far = f"{numpy.maximum(space.low - values, values - space.high).max():.3g}"
            where = f"env {self.name}: the observation {name}"
            print(f"surefoot: {where} lies up to {far} outside its space; used as it is", file=sys.stderr)


def mask_width(action_space: Any) -> int:
    """How many actions a mask names: those of all choices together."""
    return int(action_space.n if isinstance(action_space, spaces.Discrete) else numpy.sum(action_space.nvec))


def choices(action_space: Any, masks: NDArray[Any]) -> list[NDArray[Any]]:
    """Masks [..., A] split into those of each choice."""
    sizes = getattr(action_space, "nvec", [masks.shape[-1]])
    return numpy.split(masks, numpy.cumsum(sizes)[:-1], axis=-1)


def _are_counts_within(space: Any, values: NDArray[Any]) -> bool:
    if isinstance(space, spaces.MultiBinary):
        return bool(((values == 0) | (values == 1)).all())
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return True
    first, count = space.start, space.n if isinstance(space, spaces.Discrete) else space.nvec
    return bool(((values >= first) & (values < first + count)).all())


def _can_be_exceeded(space: Any) -> bool:
    """Whether values of a Box's type can lie beyond its bounds."""
    if not isinstance(space, spaces.Box) or space.dtype.kind not in "fiu":
        return False
    if space.dtype.kind == "f":
        return bool(numpy.isfinite(space.low).any() or numpy.isfinite(space.high).any())
    limits = numpy.iinfo(space.dtype)
    return bool((space.low > limits.min).any() or (space.high < limits.max).any())


def _check_mask_space(mask: Any, action_space: Any) -> None:
    if not isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete)):
        kind = type(action_space).__name__
        raise InputError(f"env: action masks are for Discrete and MultiDiscrete actions, not {kind}")
    if tuple(mask.shape) != (mask_width(action_space),):
        raise InputError(_mask_shape("env", "the action_mask has", mask.shape, action_space))


def _mask_shape(where: str, what: str, shape: Any, action_space: Any) -> str:
    width = mask_width(action_space)
    return f"{where}: {what} shape {list(shape)}; {action_space} has {width} actions to name"

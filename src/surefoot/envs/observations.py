"""Observations by name: the leaves of their space, one of them or many, and what is checked in each step."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy
from gymnasium import spaces
from numpy.typing import NDArray

from surefoot.errors import InputError
from surefoot.types import ACTION_MASK, LARGEST_BOUND, OBSERVATION

WIDEST = 2**22  # numbers; a first or last layer of 64 for as many has a gigabyte
Arrays = dict[str, NDArray[Any]]


def leaves(space: spaces.Space[Any]) -> dict[str, Any]:
    """Leaves of a space by name, nested ones as `outer.inner`. Raises InputError for containers but Dict."""
    by_name = flat(space)
    for leaf in by_name.values():
        if not isinstance(leaf, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            ours = "Box, Discrete, MultiDiscrete, MultiBinary and Dict are"
            how = "FlattenObservation makes a Tuple a Box, FilterObservation leaves parts of a Dict out"
            kind = type(leaf).__name__
            raise InputError(f"env: the observation space {kind} is not supported; {ours} ({how})")
    return by_name


def check_sizes(observation_space: Any, action_space: Any) -> None:
    """Raise InputError for spaces of more numbers, choices counted one by one, than a network is made for."""
    for kind, space in (("observation", observation_space), ("action", action_space)):
        if (size := sum(map(_width, flat(space).values()))) > WIDEST:
            found = f"the {kind} space {type(space).__name__} has {size:,} numbers or choices"
            raise InputError(f"env: {found}, over {WIDEST:,}; make it smaller, or a Box of few numbers")


def _width(space: Any) -> int:
    choices = getattr(space, "nvec", getattr(space, "n", None))
    return math.prod(getattr(space, "shape", None) or ()) if choices is None else int(numpy.sum(choices))


def flat(observations: Any, prefix: str = "") -> dict[str, Any]:
    """Values of observations, or the parts of their space, as `leaves` names them."""
    if not isinstance(observations, Mapping):
        return {prefix.removesuffix(".") or OBSERVATION: observations}
    parts = {f"{prefix}{name}": part for name, part in observations.items()}
    return {name: leaf for key, part in parts.items() for name, leaf in flat(part, f"{key}.").items()}


def batched(spaces_by_name: Mapping[str, Any], observation: Any, masks: Any = None) -> tuple[Arrays, bool]:
    """Observations (one or N) as arrays [N, ...]; whether it was one. Raises InputError for other shapes."""
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], Mapping):
        raise InputError("predict: that is what reset() gives, (observation, info); give the first alone")
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
    rows = len(arrays[first])
    for name, space in expected.items():
        if arrays[name].shape != (rows, *space.shape):
            shape, one = list(arrays[name].shape[is_one:]), list(space.shape)
            fitting = f"one is {one}, N are {['N', *one]}"
            raise InputError(f"predict: the observation {name} has shape {shape}; {fitting}")
    if ACTION_MASK in spaces_by_name:
        given, wanted = arrays.get(ACTION_MASK), (rows, *spaces_by_name[ACTION_MASK].shape)
        if given is None or given.shape != wanted:
            shape = list(wanted[is_one:])
            raise InputError(f"predict: this policy was trained with action masks; give action_masks {shape}")
        arrays[ACTION_MASK] = given.astype(bool)
    return arrays, is_one


class Checks:
    """What must hold of every observation [N, ...] by name; call it with them.

    Raises InputError for values that are not finite, counts outside their space and masks without a legal
    action. Box values beyond their bounds are warned of once and used: published environments have them.
    So are images whose unbounded space says nothing of their scale.
    """

    def __init__(self, spaces_by_name: Mapping[str, Any], action_space: Any, name: str, where: str = "env"):
        self.spaces, self.action_space, self.name, self.where = spaces_by_name, action_space, name, where
        self.row = "sub-environment" if where == "env" else "row"
        if ACTION_MASK in spaces_by_name:
            self._check_mask_shape(spaces_by_name[ACTION_MASK].shape)
        limits = {n: _limits(space) for n, space in spaces_by_name.items() if n != ACTION_MASK}
        self._limits = {n: both for n, both in limits.items() if both is not None}
        boxes = {n: space for n, space in spaces_by_name.items() if len(space.shape or ()) == 3}
        largest = {n: numpy.abs(numpy.float64(getattr(space, "high", 0))).max() for n, space in boxes.items()}
        self._unscaled = {n for n, most in largest.items() if not most <= LARGEST_BOUND}

    def __call__(self, arrays: Arrays, is_over: NDArray[numpy.bool_] | None = None) -> None:
        """Check all; where `is_over` [N], no action need be legal."""
        self.are_finite(arrays)
        if (masks := arrays.get(ACTION_MASK)) is not None:
            self._check_mask_shape(masks.shape[1:])
            can_act = [choice.any(-1) for choice in choices(self.action_space, masks)]
            stuck = ~numpy.logical_and.reduce(can_act)
            stuck = stuck if is_over is None else stuck & ~is_over
            self._refuse(stuck, "has no legal action in its action_mask; end the episode there")
        for name, (low, high) in list(self._limits.items()):
            if not ((values := arrays[name]) < low).any() and not (values > high).any():
                continue
            if not isinstance(self.spaces[name], spaces.Box):
                space = self.spaces[name]
                raise InputError(f"{self.where}: the observation {name} lies outside its space {space}")
            del self._limits[name]
            far = f"{numpy.maximum(low - values, values - high).max():.3g}"
            where = f"env {self.name}: the observation {name}"
            print(f"surefoot: {where} lies up to {far} outside its space; used as it is", file=sys.stderr)
        for name in list(self._unscaled):
            if (most := float(numpy.abs(arrays[name]).max())) > 10:
                self._unscaled.remove(name)
                how = "scale it to about [0, 1], or give its space bounds, by which it is divided"
                what = f"env {self.name}: the observation {name} goes up to {most:g}"
                print(f"surefoot: {what}; {how}", file=sys.stderr)

    def are_finite(self, arrays: Arrays) -> None:
        """Check that alone."""
        for name, values in arrays.items():
            # The sum first: one number to look at, and where it is finite so are all the others.
            if values.dtype.kind != "f":
                continue
            with numpy.errstate(over="ignore"):
                numbers = values.astype(numpy.float32, copy=False)  # what networks compute with
                is_finite = math.isfinite(numbers.sum())
            if not is_finite:
                finite = numpy.isfinite(numbers.reshape(len(numbers), -1)).all(1)
                why = "is not finite in float32; fix the environment"
                self._refuse(~finite, why, f"the observation {name} of ")

    def _refuse(self, is_wrong: Any, why: str, what: str = "") -> None:
        """Raise InputError with the first row that is wrong, if any is."""
        if is_wrong.any():
            place = f"{what}{self.row} {int(numpy.argmax(is_wrong))}"
            raise InputError(f"{self.where}: {place} {why}")

    def _check_mask_shape(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) != (width := mask_width(self.action_space),):
            has = f"shape {list(shape)}; {self.action_space} has {width} actions to name"
            raise InputError(f"{self.where}: the action_mask has {has}")


def mask_width(action_space: Any) -> int:
    """How many actions a mask names: those of all choices together. Raises InputError for other spaces."""
    if not isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete)):
        kind = type(action_space).__name__
        raise InputError(f"env: action masks are for Discrete and MultiDiscrete actions, not {kind}")
    return int(action_space.n if isinstance(action_space, spaces.Discrete) else numpy.sum(action_space.nvec))


def choices(action_space: Any, masks: NDArray[Any]) -> list[NDArray[Any]]:
    """Masks [..., A] split into those of each choice."""
    sizes = getattr(action_space, "nvec", [masks.shape[-1]])
    return numpy.split(masks, numpy.cumsum(sizes)[:-1], axis=-1)


def _limits(space: Any) -> tuple[Any, Any] | None:
    """The lowest and the highest values of a space; None where the type of its values allows no others."""
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return space.start, space.start + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    if space.dtype.kind not in "fiu":
        return None
    types = numpy.iinfo(space.dtype) if space.dtype.kind in "iu" else None
    least, most = (-numpy.inf, numpy.inf) if types is None else (types.min, types.max)
    return (space.low, space.high) if (space.low > least).any() or (space.high < most).any() else None

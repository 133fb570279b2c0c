"""Spaces as JSON, and an environment that has nothing but them: what a model is loaded with to predict."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy
from gymnasium import spaces

from surefoot.envs.observations import mask_width
from surefoot.errors import InputError

SPACES = "spaces.json"
FIELDS = {"Box": ["low", "high"], "Discrete": ["n", "start"], "MultiDiscrete": ["nvec", "start"]}
FIELDS["MultiBinary"] = ["n"]


class OnlySpaces(gymnasium.Env[Any, Any]):
    """Stands for the environment that a model was trained in, where none is given."""

    def __init__(self, observation: Any, action: Any, has_masks: bool):
        self.observation_space, self.action_space = _space(observation), _space(action)
        if has_masks:
            self.action_masks = lambda: numpy.ones(mask_width(self.action_space), dtype=bool)

    def reset(self, **_: Any) -> Any:
        """Refused: it cannot be played."""
        raise InputError("the model was loaded without an environment; give it one: model.set_env(env)")


def save_spaces(folder: Path, **spaces_: Any) -> None:
    """Write `observation` and `action`, and whether actions are masked."""
    (folder / SPACES).write_text(json.dumps(spaces_, default=_described), encoding="utf-8")


def load_spaces(folder: Path) -> OnlySpaces | None:
    """What `save_spaces` wrote, or None where it is not there. Raises InputError for a damaged file."""
    if not (file := folder / SPACES).is_file():
        return None
    try:
        return OnlySpaces(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None


def channels_first(space: Any) -> Any:
    """A space whose images have their channels first, as Stable-Baselines3's networks get them."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: channels_first(part) for name, part in space.items()})
    if not (isinstance(space, spaces.Box) and len(space.shape) == 3 and space.shape[2] < space.shape[0]):
        return space
    low, high = (bound.transpose(2, 0, 1) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)  # type: ignore[arg-type]


def _described(space: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return dict(space)
    kind = type(space).__name__
    # JSON has no infinity: the largest number stands for it.
    values = [numpy.nan_to_num(getattr(space, name)).tolist() for name in FIELDS[kind]]
    return [kind, str(space.dtype), *values]


def _space(given: Any) -> Any:
    if isinstance(given, dict):
        return spaces.Dict({name: _space(part) for name, part in given.items()})
    kind, dtype, *values = given
    if kind == "Box":
        low, high = (numpy.array(value, dtype=dtype) for value in values)
        return spaces.Box(low, high, dtype=low.dtype.type)
    return getattr(spaces, kind)(values[0], **({"start": values[1]} if len(values) > 1 else {}))

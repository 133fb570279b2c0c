"""CartPole-v1 without velocities in its observations: the policy needs a recurrent state."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

SEEN = [0, 2]  # the cart's place and the pole's angle; 1 and 3 are their velocities


def make(**settings: Any) -> gymnasium.Env:
    """The environment; `settings` go to `gymnasium.make`."""
    env = gymnasium.make("CartPole-v1", **settings)
    space = env.observation_space
    seen = gymnasium.spaces.Box(space.low[SEEN], space.high[SEEN], dtype=np.float32)
    return gymnasium.wrappers.TransformObservation(env, lambda observation: observation[SEEN], seen)

"""Stable-Baselines3's vector environments: theirs as Gymnasium's, and ours with their methods.

Theirs are known by what they can do, so that nothing of Stable-Baselines3 is imported.
"""

from typing import Any

import gymnasium
import numpy
from gymnasium.vector import AutoresetMode

from surefoot.envs.gym import Vector
from surefoot.types import OBSERVATION


def is_vec_env(env: Any) -> bool:
    """Whether it steps as Stable-Baselines3's vector environments do: four values, reset within a step."""
    has = all(hasattr(env, name) for name in ("step_wait", "env_method", "observation_space", "num_envs"))
    return has and not isinstance(env, gymnasium.vector.VectorEnv)


class FromVecEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """A vector environment of Stable-Baselines3's kind as one of Gymnasium's that resets in the same step."""

    def __init__(self, venv: Any):
        self.venv, self.num_envs = venv, venv.num_envs
        self.single_observation_space, self.single_action_space = venv.observation_space, venv.action_space
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin episodes; without a seed, from those that the environment was given."""
        if seed is not None:
            self.venv.seed(seed)
        return self.venv.reset(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Act."""
        observations, rewards, dones, given = self.venv.step(actions)
        cut, infos = numpy.zeros(self.num_envs, dtype=bool), dict[str, Any]()
        for i, info in enumerate(map(dict, given)):
            is_cut, last = info.pop("TimeLimit.truncated", False), info.pop("terminal_observation", None)
            cut[i] = is_cut and dones[i]
            infos = self._add_info(infos, info | ({"final_obs": last} if dones[i] else {}), i)
        return observations, rewards, numpy.asarray(dones, dtype=bool) & ~cut, cut, infos

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a method of every sub-environment; where none can be called, they have nothing."""
        try:
            return tuple(self.venv.env_method(name, *arguments))
        except (AttributeError, NotImplementedError):
            if name != "has_wrapper_attr":
                raise
            return (False,) * self.num_envs

    def render(self) -> Any:
        """One picture of all."""
        return (self.venv.render(),)

    def close_extras(self, **_: Any) -> None:
        """End the environments."""
        self.venv.close()


class VecEnv:
    """Our vector environment with the methods of Stable-Baselines3's: what `get_env` gives.

    Whoever steps or resets it ends the episodes under way: training begins new ones afterwards.
    """

    def __init__(self, vector: Vector):
        self.vector, self.num_envs, self.action_space = vector, vector.num_envs, vector.action_space
        self.observation_space, self.metadata = vector.env.single_observation_space, vector.env.metadata

    def reset(self) -> Any:
        """Begin an episode in every sub-environment; what to act on, without infos."""
        self.vector.position = None
        return self._as_given(self.vector.reset())

    def step(self, actions: Any) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        """Observations, rewards, dones, infos; an episode that ended is followed by the next at once."""
        self.vector.position = None
        step = self.vector.step(numpy.asarray(actions))
        return self._as_given(step.observations), step.rewards, step.ended, step.infos_by_env()

    def render(self, mode: str | None = None) -> Any:
        """The pictures side by side, or None where there are none."""
        frames = [frame for frame in self.vector.env.render() or () if isinstance(frame, numpy.ndarray)]
        return numpy.concatenate(frames, axis=1) if frames else None

    def env_method(self, name: str, *arguments: Any, indices: Any = None, **settings: Any) -> list[Any]:
        """Call a method of the sub-environments `indices`, by default of all."""
        if indices is None:
            return list(self.vector.env.call(name, *arguments, **settings))
        chosen = [self.vector.env.envs[i] for i in ([indices] if isinstance(indices, int) else indices)]
        return [env.get_wrapper_attr(name)(*arguments, **settings) for env in chosen]

    def get_attr(self, name: str, indices: Any = None) -> list[Any]:
        """An attribute of the sub-environments `indices`, by default of all."""
        return self.env_method("get_wrapper_attr", name, indices=indices)

    def set_attr(self, name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the sub-environments `indices`, by default of all."""
        self.env_method("set_wrapper_attr", name, value, indices=indices)

    def close(self) -> None:
        """End the environments."""
        self.vector.close()

    def _as_given(self, arrays: dict[str, Any]) -> Any:
        is_dict = isinstance(self.observation_space, gymnasium.spaces.Dict)
        return {name: arrays[name] for name in self.observation_space} if is_dict else arrays[OBSERVATION]

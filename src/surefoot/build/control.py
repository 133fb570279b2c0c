"""Config -> an environment to act in, and a policy that acts in it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surefoot.build.preflight import build_device
from surefoot.config import Config, EnvConfig
from surefoot.core.seeds import derived_seed
from surefoot.data.user_code import Guard
from surefoot.envs.games import make_games
from surefoot.envs.gym import Vector
from surefoot.envs.make import make_vector, recorded_vector, wrap_vector
from surefoot.envs.spaces import channels_first
from surefoot.errors import InputError
from surefoot.policies.base import ActingPolicy, Policy
from surefoot.policies.control.networks import Preprocessed
from surefoot.policies.control.policy import ControlPolicy
from surefoot.policies.lm.policy import resolve_dtype
from surefoot.rewards.functions import is_function, load_function


def build_vector(config: Config, env: Any = None, for_evaluation: bool = False, show: Any = None) -> Vector:
    """What the user made, or sub-environments of `env.id`; `show` gets the frames of one's first episode."""
    assert config.env is not None
    settings = config.env
    seed = derived_seed(config.seed, "evaluation" if for_evaluation else "environment", 0)
    if env is not None and not isinstance(env, str):
        vector = wrap_vector(env, seed=seed, reseed=settings.reseed)
        if settings.n_envs not in (1, vector.num_envs):
            how = f"give an id, or a Gymnasium vector environment of {settings.n_envs}"
            raise InputError(f"n_envs: the environment given has {vector.num_envs}; {how}")
        return vector
    if settings.id is None:
        raise InputError("the environment was made in Python; give it again: PPO.load(folder, env)")
    kwargs = settings.kwargs | (settings.eval_kwargs if for_evaluation else {})
    make: Any = load_function(settings.id, key="env.id") if is_function(settings.id) else settings.id
    if show is not None:
        return recorded_vector(make, kwargs=kwargs, seed=seed, show=show)
    if has_two_players(settings):
        if settings.vectorization != "sync":
            raise InputError("env.vectorization: two-player games are stepped in one process; leave it out")
        return make_games(make, n_envs=settings.n_envs, kwargs=kwargs, seed=seed)
    vectorization = "sync" if for_evaluation and settings.vectorization == "async" else settings.vectorization
    of_env: dict[str, Any] = {"kwargs": kwargs, "seed": seed, "reseed": settings.reseed or for_evaluation}
    return make_vector(make, n_envs=settings.n_envs, vectorization=vectorization, **of_env)


def has_two_players(env: EnvConfig) -> bool:
    """Whether it is a game of PettingZoo, or played against the policy itself."""
    return env.self_play is not None or (env.id or "").startswith("classic/")


def build_control_policy(
    config: Config, env: Vector, module: nn.Module | None = None, *, make: Callable[[Any], Any] | None = None
) -> Any:
    """A network for the environment's spaces, or over `module`; or `module`, an `ActingPolicy`, itself.

    `make` makes a features extractor of Stable-Baselines3's from an observation space.
    """
    assert config.env is not None
    if make is not None:
        guard = Guard("policy_kwargs.features_extractor_class", "cannot be made:")
        with guard, torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, "network", 0))
            inner = make(channels_first(env.env.single_observation_space))
        module = Preprocessed(inner, env.observation_spaces)
    device = build_device(config.device)
    if module is not None and hasattr(module, "act"):
        asked = {name for kind in (Policy, ActingPolicy) for name in (*vars(kind), *kind.__annotations__)}
        if missing := sorted(name for name in asked if name[0] != "_" and not hasattr(module, name)):
            raise InputError(f"policy: yours has act, but lacks {', '.join(missing)} (docs/extending.md)")
        return module.to(device)
    # Only convolutions are large enough to gain from half precision.
    is_small = config.policy.dtype == "auto" and "Cnn" not in config.policy.model
    wanted = "float32" if is_small else config.policy.dtype
    dtype, seed = resolve_dtype(wanted, device), derived_seed(config.seed, "network", 0)
    spaces, normalize = (env.observation_spaces, env.action_space), config.env.normalize_observations
    network, kind = config.policy.network, config.policy.model
    return ControlPolicy(
        *spaces, extractor=module, config=network, kind=kind, normalize=normalize, dtype=dtype, seed=seed
    ).to(device)

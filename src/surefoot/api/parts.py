"""The parts of the loop for whoever writes it; `advantages`, `update`, `make_optimizer` are in train/."""

from typing import Any

from surefoot.build.control import build_control_policy, build_vector
from surefoot.config import Config, make_config
from surefoot.core.seeds import derived_seed
from surefoot.envs.gym import Vector
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.generation.engine import Engine
from surefoot.policies.control.policy import ControlPolicy
from surefoot.rollout.gym import GymRollout
from surefoot.rollout.text import TextRollout
from surefoot.types import Batch


def make_env(
    env: Any, *, n_envs: int = 1, vectorization: str = "sync", seed: int = 0, **kwargs: Any
) -> Vector:
    """`n_envs` sub-environments of a Gymnasium id, or a (vector) environment that is already made.

    `seed` decides every episode that we begin; `kwargs` go to `gymnasium.make`. Raises InputError for what
    cannot be made or has spaces that cannot be trained on.
    """
    if env is None:
        raise InputError("make_env: name a Gymnasium id, or give an environment")
    name = env if isinstance(env, str) else None
    settings = {"id": name, "n_envs": n_envs, "vectorization": vectorization, "kwargs": kwargs}
    return build_vector(_config("make_env", seed=seed, env=settings), env)


def make_policy(
    env: Vector,
    kind: str = "MlpPolicy",
    *,
    normalize_observations: bool = False,
    seed: int = 0,
    **network: Any,
) -> ControlPolicy:
    """A policy and critic for the spaces of `env`, with random weights that follow from `seed`.

    `kind` is one of `MlpPolicy`, `CnnPolicy`, `MultiInputPolicy`, or one of these with an LSTM, such as
    `MlpLstmPolicy`; `network` is fields of `policy.network`, such as `net_arch=[64, 64]`. Raises InputError
    for spaces that it does not fit.
    """
    settings = {"normalize_observations": normalize_observations}
    config = _config("make_policy", seed=seed, policy={"model": kind, "network": network}, env=settings)
    return build_control_policy(config, env)  # type: ignore[no-any-return]


def collect(
    policy: Any,
    env: Any,
    *,
    episodes: int = 64,
    first_episode: int = 0,
    seed: int = 0,
    version: int = 0,
    engine: Engine | None = None,
    config: Config | None = None,
) -> Batch:
    """Let `policy` act in `env`: a `Batch` with rewards and, where there is a reference, its log-probs.

    Arguments:
        policy: of `load_policy` for text, of `make_policy` for Gymnasium.
        env: a `TextTask`; what `make_env` gives, in which each call goes on where the last one stopped; or a
            Gymnasium id or environment, in which each call begins new episodes.
        episodes: of a `TextTask`, how many. In Gymnasium it is `config.env.n_steps` of each sub-environment.
        first_episode: of a `TextTask`, the first one's number: with `seed` it decides its randomness.
        seed: of all randomness.
        version: updates the policy has seen; in Gymnasium actions are drawn from it and `seed`.
        engine: writes the completions; by default our own.
        config: `generation`, `group` and `shaping` of text, `env` of Gymnasium, and `ppo`; by default theirs.
    """
    config = config or (Config() if isinstance(env, TextTask) else _config("collect", env={}))
    if isinstance(env, TextTask):
        text = TextRollout(policy, env, engine=engine, config=config, seed=seed)
        return text.collect(first=first_episode, count=episodes, version=version)
    if config.env is None:
        raise InputError("collect: a Gymnasium environment needs a config with the section env")
    settings = config.env.model_copy(update={"id": env if isinstance(env, str) else None})
    seeded = {"seed": derived_seed(seed, "collect", version), "env": settings}
    vector = env if isinstance(env, Vector) else build_vector(config.model_copy(update=seeded), env)
    rollout = GymRollout(policy, vector, settings=config.env, ppo=config.ppo, seed=seed)
    try:
        return rollout.collect(first=0, count=rollout.per_update, version=version)
    finally:
        if isinstance(env, str):
            vector.close()


def _config(where: str, **sections: Any) -> Config:
    return make_config({"policy": {"model": "MlpPolicy"}} | sections, where=f"{where}(...)")

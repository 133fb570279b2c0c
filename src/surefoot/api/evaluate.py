"""Stable-Baselines3's `evaluate_policy`."""

from typing import Any

import torch

from surefoot.api.ppo import PPO
from surefoot.build.control import build_vector
from surefoot.envs.make import make_vector, share_envs, wrap_vector
from surefoot.errors import InputError
from surefoot.rollout.gym import run_episodes


def evaluate_policy(
    model: PPO,
    env: Any = None,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    *,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
    seed: int = 0,
) -> Any:
    """Run whole episodes; mean and std of their returns.

    With `return_episode_rewards`, the lists of returns and lengths. `env` is a Gymnasium id, environment or
    vector environment; without one, another like the model's. `warn` changes nothing: returns are the
    environment's own, whatever wraps it. After an evaluation in the environment it is trained in, training
    begins new episodes there. Raises InputError for an environment with other spaces or in the middle of a
    rollout, AssertionError below `reward_threshold`, as Stable-Baselines3 does.
    """
    if n_eval_episodes < 1:
        raise InputError(f"evaluate_policy: n_eval_episodes is {n_eval_episodes}; play at least one")
    if model.config.env is None:
        raise InputError("evaluate_policy is for environments; a language model has evaluate")
    if env is None and model.config.env.id is None:
        raise InputError("evaluate_policy: the model's environment was made in Python; pass one")
    if env is None:
        vector = build_vector(model.config, for_evaluation=True)
    elif isinstance(env, str):
        vector = make_vector(env, n_envs=1, vectorization="sync", kwargs={}, seed=seed)
    else:
        vector = wrap_vector(env, seed=seed)
    if share_envs(vector, model.env):
        model._session.start_over()  # refused in the middle of a rollout
    try:
        vector.check_same_spaces(model.env)
        episodes = run_episodes(model.policy, vector, n_eval_episodes, seed=None if deterministic else seed)
    finally:
        if env is None or isinstance(env, str):
            vector.close()
    returns, lengths = [e.total for e in episodes], [e.steps for e in episodes]
    mean = sum(returns) / len(returns)
    if reward_threshold is not None and not mean > reward_threshold:  # python -O leaves asserts out
        raise AssertionError(f"{vector.name}: mean return {mean:.2f} <= {reward_threshold:.2f}")
    if return_episode_rewards:
        return returns, lengths
    return mean, float(torch.tensor(returns).double().std(unbiased=False))

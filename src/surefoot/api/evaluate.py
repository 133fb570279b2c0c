"""Stable-Baselines3's `evaluate_policy`."""

import functools
from typing import Any

import torch

from surefoot.api.ppo import PPO
from surefoot.build.control import build_vector
from surefoot.envs.gym import VectorStep
from surefoot.envs.make import make_vector, share_envs, wrap_vector
from surefoot.errors import InputError
from surefoot.rollout.gym import run_episodes

OTHERS = {"return_episode_rewards": False, "seed": None, "warn": True, "use_masking": True}


def evaluate_policy(
    model: Any,
    env: Any = None,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    *,
    callback: Any = None,
    reward_threshold: float | None = None,
    **others: Any,
) -> Any:
    """Run whole episodes; mean and std of their returns.

    Arguments:
        model: a `PPO`, or its policy, which needs an `env`.
        env: a Gymnasium id, (vector) environment or one of Stable-Baselines3's; by default another like the
            model's. Of an id the episodes are the same each time; an environment that was made goes on,
            unless a `seed` is given.
        callback: called `(locals, globals)` after each step with `i`, `reward`, `done`, `info` of each.
        others: `return_episode_rewards=True` for the lists of returns and lengths; `seed`; `warn` and
            `use_masking`, which change nothing: returns are the environment's own, whatever wraps it.

    After an evaluation in the environment it is trained in, training begins new episodes there. Raises
    InputError for an environment with other spaces or in the middle of a rollout, AssertionError below
    `reward_threshold`, as Stable-Baselines3 does.
    """
    if unknown := next(iter(others.keys() - OTHERS.keys()), None):
        raise InputError(f"evaluate_policy: unknown setting {unknown!r}; {', '.join(OTHERS)} are known")
    others = OTHERS | others
    seed = others["seed"]
    if n_eval_episodes < 1:
        raise InputError(f"evaluate_policy: n_eval_episodes is {n_eval_episodes}; play at least one")
    config, policy = (model.config, model.policy) if isinstance(model, PPO) else (None, model)
    if config is not None and config.env is None:
        raise InputError("evaluate_policy is for environments; a language model has evaluate")
    if env is None and (config is None or config.env is None or config.env.id is None):
        raise InputError("evaluate_policy: the model's environment was made in Python; pass one")
    if env is None and config is not None:
        vector = build_vector(config, for_evaluation=True)
    elif isinstance(env, str):
        vector = make_vector(env, n_envs=1, vectorization="sync", kwargs={}, seed=seed or 0)
    else:
        vector = wrap_vector(env, seed=seed, reseed=seed is not None)
    if isinstance(model, PPO) and share_envs(vector, model.env):
        model._session.start_over()  # refused in the middle of a rollout
    try:
        vector.check_same_spaces(model.env if isinstance(model, PPO) else policy)
        noise = None if deterministic else seed or 0
        shown = functools.partial(_show, vector, model, callback, render) if callback or render else None
        episodes = run_episodes(policy, vector, n_eval_episodes, seed=noise, on_step=shown)
    finally:
        if env is None or isinstance(env, str):
            vector.close()
    returns, lengths = [e.total for e in episodes], [e.steps for e in episodes]
    mean = sum(returns) / len(returns)
    if reward_threshold is not None and not mean > reward_threshold:  # python -O leaves asserts out
        raise AssertionError(f"{vector.name}: mean return {mean:.2f} <= {reward_threshold:.2f}")
    if others["return_episode_rewards"]:
        return returns, lengths
    return mean, float(torch.tensor(returns).double().std(unbiased=False))


def _show(vector: Any, model: Any, callback: Any, render: bool, step: VectorStep) -> None:
    for i, info in enumerate(step.infos_by_env() if callback else ()):
        found = {"i": i, "reward": step.rewards[i], "done": bool(step.ended[i]), "info": info}
        callback(found | {"model": model, "env": vector, "rewards": step.rewards}, {})
    if render:
        vector.env.render()

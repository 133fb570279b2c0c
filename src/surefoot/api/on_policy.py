"""The other names under which Stable-Baselines3 and sb3-contrib have PPO."""

from typing import Any

from surefoot.api.ppo import PPO


class A2C(PPO):
    """Advantage actor-critic: PPO with one minibatch, whose ratio is 1, so that nothing is clipped.

    The defaults are Stable-Baselines3's, RMSprop among them.
    """

    def __init__(self, policy: Any, env: Any = None, **settings: Any):
        if settings.get("config") is None:
            settings = _a2c(settings, env)
        super().__init__(policy, env, **settings)


def _a2c(given: dict[str, Any], env: Any) -> dict[str, Any]:
    settings = {"learning_rate": 7e-4, "n_steps": 5, "gae_lambda": 1.0, "normalize_advantage": False} | given
    is_rms = settings.pop("use_rms_prop", True)
    epsilon = settings.pop("rms_prop_eps", 1e-5)
    if is_rms and "optimizer_class" not in (settings.get("policy_kwargs") or {}):
        settings = {"optimizer": "rmsprop", "adam_epsilon": epsilon} | settings
    n_envs = getattr(env, "num_envs", settings.get("n_envs", 1))
    return {"n_epochs": 1, "batch_size": settings["n_steps"] * n_envs} | settings


class MaskablePPO(PPO):
    """PPO, which takes action masks by itself."""


class RecurrentPPO(PPO):
    """PPO with one of the policies that have an LSTM."""

"""Surefoot: PPO for language models, and for anything with a reward. Public names, loaded at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surefoot.api.evaluate import evaluate_policy
    from surefoot.api.new_model import new_model
    from surefoot.api.parts import collect, make_env, make_policy
    from surefoot.api.ppo import PPO
    from surefoot.api.reward_model import RewardModel
    from surefoot.api.sft import SFT
    from surefoot.envs.text import TextTask
    from surefoot.errors import GateError, InputError, Interrupted, NonFiniteError, SurefootError
    from surefoot.policies.lm.policy import load_policy
    from surefoot.train.callbacks import BaseCallback
    from surefoot.train.ppo_objective import PPOObjective, advantages
    from surefoot.train.update import make_optimizer, update

_HOMES = {
    "GateError": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "NonFiniteError": "errors",
    "PPO": "api.ppo",
    "PPOObjective": "train.ppo_objective",
    "RewardModel": "api.reward_model",
    "SFT": "api.sft",
    "SurefootError": "errors",
    "TextTask": "envs.text",
    "BaseCallback": "train.callbacks",
    "advantages": "train.ppo_objective",
    "collect": "api.parts",
    "evaluate_policy": "api.evaluate",
    "load_policy": "policies.lm.policy",
    "make_env": "api.parts",
    "make_optimizer": "train.update",
    "make_policy": "api.parts",
    "new_model": "api.new_model",
    "update": "train.update",
}

__version__ = "0.1.0"
__all__ = [
    "PPO",
    "SFT",
    "BaseCallback",
    "GateError",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "PPOObjective",
    "RewardModel",
    "SurefootError",
    "TextTask",
    "advantages",
    "collect",
    "evaluate_policy",
    "load_policy",
    "make_env",
    "make_optimizer",
    "make_policy",
    "new_model",
    "update",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import surefoot` and `surefoot --help` must not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"surefoot.{_HOMES[name]}"), name)
    if name == "assets":
        return importlib.import_module("surefoot.data.assets")
    raise AttributeError(f"module 'surefoot' has no attribute {name!r}")

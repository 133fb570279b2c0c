"""Surefoot: PPO for language models, and for anything with a reward. The public names, loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surefoot.envs.text import TextTask
    from surefoot.errors import GateError, InputError, Interrupted, NonFiniteError, SurefootError
    from surefoot.from_scratch import new_model
    from surefoot.policies.lm import load_policy
    from surefoot.ppo import PPO
    from surefoot.reward_model import RewardModel
    from surefoot.rollout.text import collect
    from surefoot.sb3 import BaseCallback, evaluate_policy
    from surefoot.sft import SFT
    from surefoot.train.update import advantages, update

_HOMES = {
    "GateError": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "NonFiniteError": "errors",
    "PPO": "ppo",
    "RewardModel": "reward_model",
    "SFT": "sft",
    "SurefootError": "errors",
    "TextTask": "envs.text",
    "BaseCallback": "sb3",
    "advantages": "train.update",
    "collect": "rollout.text",
    "evaluate_policy": "sb3",
    "load_policy": "policies.lm",
    "new_model": "from_scratch",
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
    "RewardModel",
    "SurefootError",
    "TextTask",
    "advantages",
    "collect",
    "evaluate_policy",
    "load_policy",
    "new_model",
    "update",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import surefoot` and `surefoot --help` must not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"surefoot.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'surefoot' has no attribute {name!r}")

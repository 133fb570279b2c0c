"""Surefoot: PPO for language models, and for anything with a reward. Public names, loaded at first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surefoot.api.evaluate import evaluate_policy as evaluate_policy
    from surefoot.api.new_model import new_model as new_model
    from surefoot.api.on_policy import A2C as A2C
    from surefoot.api.on_policy import MaskablePPO as MaskablePPO
    from surefoot.api.on_policy import RecurrentPPO as RecurrentPPO
    from surefoot.api.parts import collect as collect
    from surefoot.api.parts import make_env as make_env
    from surefoot.api.parts import make_policy as make_policy
    from surefoot.api.ppo import PPO as PPO
    from surefoot.api.reward_model import RewardModel as RewardModel
    from surefoot.api.supervised import DPO as DPO
    from surefoot.api.supervised import SFT as SFT
    from surefoot.envs.text import TextTask as TextTask
    from surefoot.errors import GateError as GateError
    from surefoot.errors import InputError as InputError
    from surefoot.errors import Interrupted as Interrupted
    from surefoot.errors import NonFiniteError as NonFiniteError
    from surefoot.errors import SurefootError as SurefootError
    from surefoot.policies.lm.policy import load_policy as load_policy
    from surefoot.train.callbacks import BaseCallback as BaseCallback
    from surefoot.train.ppo_objective import PPOObjective as PPOObjective
    from surefoot.train.ppo_objective import advantages as advantages
    from surefoot.train.update import make_optimizer as make_optimizer
    from surefoot.train.update import update as update

_PUBLIC = {
    "api.evaluate": ("evaluate_policy",),
    "api.new_model": ("new_model",),
    "api.on_policy": ("A2C", "MaskablePPO", "RecurrentPPO"),
    "api.parts": ("collect", "make_env", "make_policy"),
    "api.ppo": ("PPO",),
    "api.reward_model": ("RewardModel",),
    "api.supervised": ("DPO", "SFT"),
    "envs.text": ("TextTask",),
    "errors": ("GateError", "InputError", "Interrupted", "NonFiniteError", "SurefootError"),
    "policies.lm.policy": ("load_policy",),
    "train.callbacks": ("BaseCallback",),
    "train.ppo_objective": ("PPOObjective", "advantages"),
    "train.update": ("make_optimizer", "update"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__version__ = "0.1.0"
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import surefoot` and `surefoot --help` must not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"surefoot.{_HOMES[name]}"), name)
    theirs = ("StopTraining", "Vec", "DummyVec", "SubprocVec", "make_vec")
    if name.endswith("Callback") or name.startswith(theirs):
        how = "the one of stable_baselines3 works here: import it from there (docs/from-sb3.md)"
        raise ImportError(f"surefoot has no {name}; {how}")  # an AttributeError's words would be lost
    if name == "assets":
        return importlib.import_module("surefoot.data.assets")
    raise AttributeError(f"module 'surefoot' has no attribute {name!r}")

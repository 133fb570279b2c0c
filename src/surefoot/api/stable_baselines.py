"""Stable-Baselines3's keywords, as settings of ours."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy

from surefoot.errors import InputError
from surefoot.policies.control.networks import ACTIVATIONS

# Setting -> its value by the share of the run that is left.
Schedules = dict[str, Callable[[float], float]]

# Keywords of `policy_kwargs` that are fields of policy.network.
NETWORK_KEYS = ("net_arch", "ortho_init", "log_std_init", "lstm_hidden_size")
LSTM_FLAGS = {"shared_lstm": False, "enable_critic_lstm": True}  # of sb3-contrib
NONE_IS_DEFAULT = ("tensorboard_log", "policy_kwargs", "clip_range_vf", "target_kl")
SCHEDULED = {"learning_rate": "lr_schedule", "clip_range": "clip_schedule"}


def translated(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Schedules]:
    """Stable-Baselines3's keywords as our settings, and the schedules that are functions.

    Raises InputError for one that has no counterpart, naming what to do instead.
    """
    given = {k: v for k, v in settings.items() if v is not None or k not in NONE_IS_DEFAULT}
    ours = {k: v.item() if isinstance(v, numpy.generic) else v for k, v in given.items()}
    schedules = {}
    ours.pop("_init_setup_model", None)
    for name, schedule in SCHEDULED.items():
        if callable(ours.get(name)):
            schedules[name] = ours[name]
            ours[name], ours[schedule] = float(ours[name](1.0)), "function"
    if callable(ours.get("clip_range_vf")):
        raise InputError("clip_range_vf: a number is expected; a schedule for it is not supported")
    if "tensorboard_log" in ours:  # TensorBoard always stands in the run's folder
        ours["run_folder"] = str(ours.pop("tensorboard_log"))
    if ours.pop("stats_window_size", 100) != 100:
        raise InputError("stats_window_size: means are over the last 100 episodes; leave it out")
    network = dict(ours.pop("network", None) or {}) | _network(ours.pop("policy_kwargs", {}))
    network |= {name: ours.pop(name) for name in ("use_sde", "sde_sample_freq") if name in ours}
    if network:
        ours["network"] = network
    return ours, schedules


def _network(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    network: dict[str, Any] = {}
    for name, value in policy_kwargs.items():
        if name == "activation_fn":
            found = [known for known, module in ACTIVATIONS.items() if module is value or known == value]
            if not found:
                known = ", ".join(ACTIVATIONS)
                raise InputError(f"policy_kwargs.activation_fn: {value!r} is not one of {known}")
            network["activation"] = found[0]
        elif name in LSTM_FLAGS:
            if value is not LSTM_FLAGS[name]:
                how = "network={'share': True} gives them one, and one set of layers after it"
                raise InputError(f"policy_kwargs.{name}: actor and critic have an LSTM each here; {how}")
        elif name in NETWORK_KEYS:
            network[name] = value
        else:
            known = ", ".join(("activation_fn", *NETWORK_KEYS))
            how = "pass an nn.Module as the policy instead"
            raise InputError(f"policy_kwargs.{name} has no counterpart ({known} have); {how}")
    return network

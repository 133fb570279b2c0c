"""Stable-Baselines3's keywords, as settings of ours, and what its programs ask of a model."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy

from surefoot.api.session import Session
from surefoot.build.control import build_vector
from surefoot.config import Config
from surefoot.envs.vec_env import FromVecEnv, VecEnv
from surefoot.errors import InputError
from surefoot.policies.control.networks import ACTIVATIONS

# Setting -> its value by the share of the run that is left.
Schedules = dict[str, Callable[[float], float]]

# Keywords of `policy_kwargs` that are fields of policy.network.
NETWORK_KEYS = ("net_arch", "ortho_init", "log_std_init", "lstm_hidden_size", "use_sde")
# sb3-contrib's for an LSTM: the value that is had here, and why.
NEAREST: dict[str, tuple[Any, str]] = {
    "n_lstm_layers": (1, "the LSTM has one layer"),
    "enable_critic_lstm": (True, "actor and critic have an LSTM each"),
    "lstm_kwargs": ({}, "the LSTM is torch's by default"),
}
OPTIMIZERS = {"Adam": "adam", "RMSprop": "rmsprop", "RMSpropTFLike": "rmsprop"}
NONE_IS_DEFAULT = ("tensorboard_log", "policy_kwargs", "clip_range_vf", "target_kl", "batch_size")
SCHEDULED = {"learning_rate": "lr_schedule", "clip_range": "clip_schedule"}
# Stable-Baselines3's policies that are no more than a name.
POLICIES = {
    "ActorCriticPolicy": "Mlp",
    "ActorCriticCnnPolicy": "Cnn",
    "MultiInputActorCriticPolicy": "MultiInput",
}
# What is read of a model, by the section of the configuration that has it.
OF_PPO = (
    "batch_size",
    "n_epochs",
    "gamma",
    "gae_lambda",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "target_kl",
)
READ = {"ppo": OF_PPO, "env": ("n_steps",)}


class Translated(NamedTuple):
    """Settings of ours, schedules that are functions, and what makes a features extractor of a space."""

    settings: dict[str, Any]
    schedules: Schedules
    extractor: Callable[[Any], Any] | None


def translated(settings: Mapping[str, Any], policy: Any) -> Translated:
    """Stable-Baselines3's keywords for a `policy`.

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
    if "device" in ours:
        ours["device"] = str(ours["device"]).removesuffix(":0")
    if ours.pop("stats_window_size", 100) != 100:
        raise InputError("stats_window_size: means are over the last 100 episodes; leave it out")
    policy_kwargs = dict(ours.pop("policy_kwargs", {}))
    kind, arguments = (policy_kwargs.pop(f"features_extractor_{name}", None) for name in ("class", "kwargs"))
    extractor = None if kind is None else functools.partial(kind, **(arguments or {}))
    ours |= _optimizer(policy_kwargs)
    network = dict(ours.pop("network", None) or {}) | _network(policy_kwargs)
    network |= {name: ours.pop(name) for name in ("use_sde", "sde_sample_freq") if name in ours}
    if network:
        ours["network"] = network
    steps, size = ours.get("n_steps", 128), ours.get("batch_size", 128)
    is_recurrent = isinstance(policy, str) and "Lstm" in policy
    if is_recurrent and isinstance(steps, int) and isinstance(size, int) and steps > 0 and size % steps:
        ours["batch_size"] = steps * max(1, round(size / steps))
        said = f"batch_size {size} becomes {ours['batch_size']}: an LSTM is trained on whole rows of n_steps"
        print(f"surefoot: {said} ({steps})", file=sys.stderr)
    return Translated(ours, schedules, extractor)


def policy_name(policy: Any) -> Any:
    """A policy class of Stable-Baselines3's as its name. Raises InputError for a class of the user's own."""
    if not isinstance(policy, type):
        return policy
    kind = policy.__name__.removeprefix("Maskable").removeprefix("Recurrent")
    if kind in POLICIES and policy.__module__.partition(".")[0] in ("stable_baselines3", "sb3_contrib"):
        return f"{POLICIES[kind]}{'Lstm' if policy.__name__.startswith('Recurrent') else ''}Policy"
    how = "give its layers as policy_kwargs (net_arch, activation_fn, features_extractor_class)"
    raise InputError(f"policy: {policy.__name__} is your own; {how}, or an nn.Module (docs/from-sb3.md)")


def _optimizer(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes `optimizer_class` and its arguments out, as settings of ours."""
    kind, given = policy_kwargs.pop("optimizer_class", None), policy_kwargs.pop("optimizer_kwargs", None)
    arguments = {name: value for name, value in (given or {}).items() if (name, value) != ("alpha", 0.99)}
    found: dict[str, Any] = {"adam_epsilon": arguments.pop("eps")} if "eps" in arguments else {}
    name = getattr(kind, "__name__", "Adam")
    if name not in OPTIMIZERS:
        raise InputError(f"policy_kwargs.optimizer_class: {name} is not one of {', '.join(OPTIMIZERS)}")
    if wrong := next((name for name, value in arguments.items() if value), None):
        raise InputError(f"policy_kwargs.optimizer_kwargs: {wrong} cannot be set; eps can")
    return found | ({} if kind is None else {"optimizer": OPTIMIZERS[name]})


def _network(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    network: dict[str, Any] = {}
    for name, value in policy_kwargs.items():
        if name == "activation_fn":
            found = [known for known, module in ACTIVATIONS.items() if module is value or known == value]
            if not found:
                known = ", ".join(ACTIVATIONS)
                raise InputError(f"policy_kwargs.activation_fn: {value!r} is not one of {known}")
            network["activation"] = found[0]
        elif name == "shared_lstm":
            network["share"] = bool(value)
        elif name in NEAREST and (value or {}) != NEAREST[name][0] and not policy_kwargs.get("shared_lstm"):
            print(f"surefoot: policy_kwargs.{name} is not supported: {NEAREST[name][1]}", file=sys.stderr)
        elif name == "net_arch":
            arch = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
            parts = arch if isinstance(arch, dict) else {"": arch}
            parts = {part: list(wide) if isinstance(wide, tuple) else wide for part, wide in parts.items()}
            network[name] = parts if isinstance(arch, dict) else parts[""]
        elif name in NETWORK_KEYS:
            network[name] = value
        elif name not in NEAREST:
            known = ", ".join(("activation_fn", *NETWORK_KEYS, "features_extractor_class", "optimizer_class"))
            how = "pass an nn.Module as the policy instead"
            raise InputError(f"policy_kwargs.{name} has no counterpart ({known} have); {how}")
    return network


class StableBaselines(Protocol):
    """What Stable-Baselines3's programs ask of a model."""

    config: Config
    policy: Any
    env: Any
    _session: Session

    def get_env(self) -> Any:
        """The environment with Stable-Baselines3's methods: the one that was given, where it has them."""
        if self.config.env is None:
            return self.env
        return self.env.env.venv if isinstance(self.env.env, FromVecEnv) else VecEnv(self.env)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train in `env` from here on. Raises InputError for one with other spaces or another num_envs."""
        settings = {"id": env if isinstance(env, str) else None}
        named = self.config.env.model_copy(update=settings)  # type: ignore[union-attr]
        vector = build_vector(self.config.model_copy(update={"env": named}), env)
        vector.check_same_spaces(self.env)
        if "parts" in vars(self._session):
            if (count := vector.num_envs) != self.env.num_envs:
                raise InputError(f"set_env: the run has {self.env.num_envs} sub-environments, not {count}")
            self._session.parts[0].env = vector  # type: ignore[attr-defined]
        vector.reward_stats = self.env.reward_stats
        self.env = self._session.source = vector

    def get_vec_normalize_env(self) -> Any:
        """The `VecNormalize` of Stable-Baselines3's around the environment, or None."""
        env = self.get_env()
        while env is not None and not hasattr(env, "obs_rms"):
            env = getattr(env, "venv", None)
        return env

    def set_logger(self, logger: Any) -> None:
        """Let a logger of Stable-Baselines3's have every metric, and what callbacks record."""
        self._session.logger.target = logger

    def dump_logs(self, iteration: int = 0) -> None:
        """Let the logger that was set write."""
        self._session.logger.dump(self._session.num_timesteps)

    def get_parameters(self) -> dict[str, Any]:
        """The policy's weights by name."""
        return {"policy": self.policy.state_dict()}

    def set_parameters(self, source: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """Take over weights: of `get_parameters`, or of a folder that `save` wrote."""
        if isinstance(source, (str, Path)):
            self.policy.load_extras(Path(source))
            return
        try:
            self.policy.load_state_dict(source["policy"], strict=exact_match)
        except (RuntimeError, LookupError) as error:
            raise InputError(
                f"set_parameters: they do not fit: {' '.join(str(error).split())[:200]}"
            ) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "config" not in vars(self) or self.config.env is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in ("observation_space", "action_space"):
            space = self.env.env.single_observation_space
            return space if name == "observation_space" else self.env.action_space
        if name in SCHEDULED:
            return self._session.schedules.get(name, getattr(self.config.ppo, name))
        if name in ("device", "ep_info_buffer", "seed"):
            finished = self._session.parts[0].finished  # type: ignore[attr-defined]
            infos = [{"r": episode.total, "l": episode.steps} for episode in finished]
            return {"device": self.policy.device, "ep_info_buffer": infos, "seed": self.config.seed}[name]
        for section, names in READ.items():
            if name in names:
                return getattr(getattr(self.config, section), name)
        how = "docs/from-sb3.md lists what Stable-Baselines3's programs find here"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}; {how}")

"""For those who come from Stable-Baselines3: its keywords, its callbacks, its `evaluate_policy`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from surefoot.envs.gym import make_vector, share_envs, wrap_vector
from surefoot.errors import InputError
from surefoot.policies.control.networks import ACTIVATIONS
from surefoot.rollout.gym import run_episodes
from surefoot.train import loop
from surefoot.train.signals import RolloutAborted

if TYPE_CHECKING:
    from surefoot.api.ppo import PPO

# Keyword of `policy_kwargs` -> field of policy.network.
NETWORK_KEYS = {
    "net_arch": "net_arch",
    "ortho_init": "ortho_init",
    "log_std_init": "log_std_init",
    "lstm_hidden_size": "lstm_hidden_size",
}
LSTM_FLAGS = {"shared_lstm": False, "enable_critic_lstm": True}  # of sb3-contrib
SCHEDULED = {"learning_rate": "lr_schedule", "clip_range": "clip_schedule"}


def translated(
    settings: Mapping[str, Any], *, verbose: int = 0
) -> tuple[dict[str, Any], dict[str, Callable[[float], float]]]:
    """Stable-Baselines3's keywords as our settings, and the schedules that are functions.

    Raises InputError for one that has no counterpart, naming what to do instead.
    """
    ours = {
        name: value.item() if isinstance(value, numpy.generic) else value for name, value in settings.items()
    }
    schedules = {}
    ours.pop("_init_setup_model", None)
    for name in ("seed", "tensorboard_log", "policy_kwargs", "clip_range_vf", "target_kl"):
        if ours.get(name, 0) is None:
            del ours[name]
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
    for name in ("use_sde", "sde_sample_freq"):
        if name in ours:
            network[name] = ours.pop(name)
    if network:
        ours["network"] = network
    return ours, schedules


def _network(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    network: dict[str, Any] = {}
    for name, value in policy_kwargs.items():
        if name == "activation_fn":
            found = [known for known, module in ACTIVATIONS.items() if module is value or known == value]
            if not found:
                raise InputError(
                    f"policy_kwargs.activation_fn: {value!r} is not one of {', '.join(ACTIVATIONS)}"
                )
            network["activation"] = found[0]
        elif name in LSTM_FLAGS:
            if value is not LSTM_FLAGS[name]:
                raise InputError(
                    f"policy_kwargs.{name}: actor and critic have an LSTM each here; network={{'share': True}} gives them one, "
                    "and one set of layers after it"
                )
        elif name in NETWORK_KEYS:
            network[NETWORK_KEYS[name]] = value
        else:
            known = ", ".join(("activation_fn", *NETWORK_KEYS))
            raise InputError(
                f"policy_kwargs.{name} has no counterpart ({known} have); pass an nn.Module as the policy instead"
            )
    return network


class BaseCallback:
    """A watcher with Stable-Baselines3's hooks: override `_on_step` and the like.

    `model`, `num_timesteps`, `n_calls`, `training_env`, `locals` (`rewards`, `dones`, `infos` of the last step) are there.
    `_on_step` returning False ends `learn` as if the budget were used up.
    """

    model: PPO
    training_env: Any

    def __init__(self, verbose: int = 0):
        self.verbose, self.n_calls, self.num_timesteps = verbose, 0, 0
        self.locals: dict[str, Any] = {}
        self.globals: dict[str, Any] = {}

    def init_callback(self, model: PPO) -> None:
        """Called once before training."""
        self.model, self.training_env, self.num_timesteps = model, model.env, model.num_timesteps
        self._init_callback()

    def on_step(self) -> bool:
        """Count, and ask `_on_step`."""
        self.n_calls += 1
        return self._on_step() is not False

    def _init_callback(self) -> None:
        """Override: before training."""

    def _on_training_start(self) -> None:
        """Override: training begins."""

    def _on_rollout_start(self) -> None:
        """Override: a rollout begins."""

    def _on_step(self) -> bool:
        """Override: all copies have made a step. False ends the training."""
        return True

    def _on_rollout_end(self) -> None:
        """Override: a rollout is over, the update begins."""

    def _on_training_end(self) -> None:
        """Override: training is over."""


class _Watch:
    """Callbacks as the loop knows them: an observer of its phases, and something called between steps."""

    def __init__(self, callbacks: Sequence[Any], model: PPO, training: loop.Training):
        self.callbacks, self.model, self.training = callbacks, model, training
        self.seen: Any = getattr(training.rollout, "latest", None)  # of the `learn` before

    def phase(self, name: str) -> None:
        """Tell the callbacks."""
        hook = {"rollout": "_on_rollout_start", "update": "_on_rollout_end"}.get(name)
        if name == "update":
            self.step()  # the rollout's last
        for callback in self.callbacks:
            if hook and isinstance(callback, BaseCallback):
                getattr(callback, hook)()

    def log(self, metrics: dict[str, float], progress: loop.Progress) -> None:
        """Metrics are in the run folder."""

    def step(self) -> None:
        """Called before each step and after the last: tells of the step before. Raises RolloutAborted if a callback says so."""
        latest = getattr(self.training.rollout, "latest", None)
        if latest is None or latest is self.seen:
            return
        self.seen = latest
        self.model.num_timesteps += self.model.n_envs
        dones = latest.terminated | latest.truncated
        found = {"rewards": latest.rewards, "dones": dones, "infos": infos_by_copy(latest.infos, len(dones))}
        for callback in self.callbacks:
            if isinstance(callback, BaseCallback):
                callback.num_timesteps = self.model.num_timesteps
                callback.locals = found
                goes_on = callback.on_step()
            else:
                goes_on = callback(found, {}) is not False
            if not goes_on:
                raise RolloutAborted


def infos_by_copy(infos: Mapping[str, Any], copies: int) -> list[dict[str, Any]]:
    """Gymnasium's dictionary of arrays as the list of dictionaries that Stable-Baselines3 has."""
    found: list[dict[str, Any]] = [{} for _ in range(copies)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        inner = infos_by_copy(values, copies) if isinstance(values, Mapping) else values
        has_it = infos.get(f"_{name}", numpy.ones(copies, dtype=bool))
        for i in range(copies):
            if has_it[i]:
                found[i][name] = inner[i]
    return found


@contextlib.contextmanager
def calling(callback: Any, model: PPO, training: loop.Training) -> Iterator[None]:
    """Let callbacks watch a training. Raises InputError for what is no callback."""
    callbacks = (
        [] if callback is None else list(callback) if isinstance(callback, (list, tuple)) else [callback]
    )
    for one in callbacks:
        if not (isinstance(one, BaseCallback) or callable(one)):
            raise InputError(
                f"callback: expected a function or a surefoot.api.stable_baselines.BaseCallback, got {type(one).__name__}"
            )
    if not callbacks:
        yield
        return
    if model.config.env is None:
        raise InputError(
            "callback: these are for environments; what a text task did is in its run folder (docs/index.md)"
        )
    watch = _Watch(callbacks, model, training)
    training.watch = watch.step
    training.observers.append(watch)
    bases = [one for one in callbacks if isinstance(one, BaseCallback)]
    for base in bases:
        base.init_callback(model)
        base._on_training_start()
    try:
        yield
    finally:
        training.watch = lambda: None
        for base in bases:
            base._on_training_end()


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
    """Play whole episodes; mean and standard deviation of their returns, or with `return_episode_rewards` the lists of
    returns and lengths.

    `env` is a Gymnasium id, environment or vector environment; without one, fresh copies of what the model was made with.
    `warn` changes nothing: returns are the environment's own, whatever wraps it. After an evaluation in the environment it is
    trained in, training begins new episodes there. Raises InputError for an environment with other spaces or in the middle
    of a rollout, AssertionError below `reward_threshold`, as Stable-Baselines3 does.
    """
    if n_eval_episodes < 1:
        raise InputError(f"evaluate_policy: n_eval_episodes is {n_eval_episodes}; play at least one")
    if model.config.env is None:
        raise InputError("evaluate_policy is for environments; a language model has evaluate")
    if env is None:
        if model.config.env.id is None:
            raise InputError(
                "evaluate_policy: the model's environment was made in Python; pass one to evaluate in"
            )
        from surefoot.build.control import build_vector

        vector = build_vector(model.config, for_evaluation=True)
    elif isinstance(env, str):
        vector = make_vector(env, n_envs=1, vectorization="sync", kwargs={}, seed=seed)
    else:
        vector = wrap_vector(env, seed=seed)
    is_training_env = share_envs(vector, model.env)
    if is_training_env:
        model._start_over()  # refused in the middle of a rollout
    try:
        vector.check_same_spaces(model.env)
        episodes = run_episodes(model.policy, vector, n_eval_episodes, seed=None if deterministic else seed)
    finally:
        if env is None or isinstance(env, str):
            vector.close()
    returns, lengths = [e.total for e in episodes], [e.steps for e in episodes]
    mean = sum(returns) / len(returns)
    if reward_threshold is not None:
        assert mean > reward_threshold, (
            f"{vector.name}: mean return {mean:.2f}, not above {reward_threshold:.2f}"
        )
    if return_episode_rewards:
        return returns, lengths
    return mean, float(torch.tensor(returns).double().std(unbiased=False))

"""`PPO`: reinforcement learning for language models and for Gymnasium environments."""

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from surefoot.api.generate import Generates
from surefoot.api.session import HasSession, Session, check_policy, merge, named_file, open_folder, resume
from surefoot.api.stable_baselines import (
    SCHEDULED,
    Schedules,
    StableBaselines,
    Translated,
    policy_name,
    translated,
)
from surefoot.build.control import build_control_policy, build_vector
from surefoot.build.language import build_demonstrations, build_policy, build_task, probe_functions
from surefoot.build.preflight import SETTINGS, preflight
from surefoot.build.training import restore_best
from surefoot.config import NETWORKS, Config, CriticConfig, make_config, sections_for, with_settings
from surefoot.config.keywords import nested, setting_keys
from surefoot.core.seeds import derived_seed
from surefoot.envs.gym import Vector
from surefoot.envs.make import made_from
from surefoot.envs.observations import Checks, batched
from surefoot.envs.spaces import load_spaces
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.gym import env_actions
from surefoot.storage.run_folder import RunFolder


@with_settings(setting_keys("ppo"))
class PPO(HasSession, Generates, StableBaselines):
    """Train a policy in an environment with PPO.

    For language: `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded
    `CausalLMPolicy`; `env` a `TextTask`. For control: `policy` is `"MlpPolicy"`, `"CnnPolicy"`,
    `"MultiInputPolicy"`, `"MlpLstmPolicy"`, `"CnnLstmPolicy"`, or an `nn.Module` with a `features_dim` that
    turns observations into features; `env` a Gymnasium id, environment or vector environment.

    Stable-Baselines3's keywords work as they do there (docs/from-sb3.md). `ptx_data` are demonstrations as
    `SFT` takes them, whose likelihood is part of the loss (docs/sft.md), with settings `ptx={"coef": 0.5}`.
    """

    def __init__(
        self,
        policy: str | Path | CausalLMPolicy | nn.Module,
        env: Any = None,
        *,
        config: Config | None = None,
        verbose: int = 1,
        run: RunFolder | None = None,
        ptx_data: Any = None,
        **settings: Any,
    ):
        policy = policy_name(policy)
        is_module = isinstance(policy, nn.Module) and not isinstance(env, TextTask)
        is_control = is_module or str(policy) in NETWORKS or (config is not None and config.env is not None)
        if is_control and env is None and config is None:
            raise InputError(f"env: PPO({policy!r:.40}) needs a Gymnasium id or (vector) environment")
        if not is_control and not isinstance(env, (TextTask, type(None))):
            given = repr(env) if isinstance(env, str) else f"a {type(env).__name__}"
            how = f"for Gymnasium the policy is one of {', '.join(NETWORKS)}"
            raise InputError(f"env: expected a TextTask(prompts, reward), got {given:.60}; {how}")
        # A module makes features alone: `model` is the network after it.
        check_policy(policy, {} if is_module else settings, nn.Module if is_control else CausalLMPolicy)
        none: Translated = Translated(settings, {}, None)
        settings, schedules, extractor = translated(settings, policy) if is_control else none
        of_text = "task" if config is None else config.supervised or "task"
        data = sections_for(config, "env" if is_control else of_text)
        merge(data, ours := nested(settings, "env" if is_control else "task"))
        if "env" in ours and not is_control:
            raise InputError(f"{min(ours['env'])}: is for Gymnasium, and this is a text task; leave it out")
        if is_control or env is not None:
            _put_environment(data, env, settings, schedules)
        if ptx_data is not None and run is None:
            data["ptx"] = (data.get("ptx") or {}) | {"data": named_file(ptx_data)}
        elif ptx_data is not None and data.get("ptx") is None:
            raise InputError("ptx_data: the run was begun without demonstrations; leave it out")
        merge(data, {"policy": {"model": str(policy)}} if isinstance(policy, (str, Path)) else {})
        self.config = make_config(data, where="PPO(...)")
        if self.config.opener != "PPO" and env is not None:
            raise InputError(f"PPO: config is of another kind of run; give it to {self.config.opener}")
        if run is None and (env is not None or is_control):
            preflight(self.config)
        ptx = self.config.ptx if env is not None else None
        demonstrations = None if ptx is None else build_demonstrations(ptx, ptx_data)
        self.policy: Any
        self.env: Any
        if is_control:
            self.env = build_vector(self.config, env)
            spaces = (self.env.observation_spaces, self.env.action_space)
            self._checks = Checks(*spaces, name=self.env.name, where="predict")
            module = policy if isinstance(policy, nn.Module) else None
            self.policy = build_control_policy(self.config, self.env, module, make=extractor)
        else:
            self.env = env
            if env is not None:
                probe_functions(env)
            self.policy = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self._session = Session(self.config, self.policy, self.env, run=run, verbose=verbose)
        self._session.schedules, self._session.demonstrations = schedules, demonstrations
        self._has_learned = False
        self._random = torch.Generator().manual_seed(derived_seed(self.config.seed, "predict", 0))

    @property
    def n_envs(self) -> int:
        """Sub-environments that are stepped together."""
        return int(self.env.num_envs) if self.config.env is not None else 1

    @property
    def num_timesteps(self) -> int:
        """Timesteps (of a task: episodes) so far; callbacks see it grow with every step."""
        return self._session.num_timesteps

    def learn(
        self,
        total: int | None = None,
        /,
        callback: Any = None,
        progress_bar: bool = False,
        *,
        total_episodes: int | None = None,
        total_timesteps: int | None = None,
        reset_num_timesteps: bool = True,
        log_interval: Any = None,
        tb_log_name: Any = None,
    ) -> "PPO":
        """Train for `total_episodes` or `total_timesteps` more, or to the end that was asked for last.

        `callback` is a function `(locals, globals) -> bool | None`, a `BaseCallback` or a list of them
        (train/callbacks.py); `progress_bar` shows the display even where `verbose` is 0. An environment that
        was given begins new episodes, unless `reset_num_timesteps=False`. `log_interval` and `tb_log_name`
        change nothing: every update is logged, in the run's folder. Raises Interrupted after SIGTERM, SIGHUP
        or Ctrl-C, once it has saved.
        """
        is_control = self.config.env is not None
        named, other = (total_timesteps, total_episodes) if is_control else (total_episodes, total_timesteps)
        name = "total_timesteps" if is_control else "total_episodes"
        if other is not None:
            raise InputError(f"learn: this run counts {name.removeprefix('total_')}; say learn({name}=...)")
        more = total if named is None else named
        more = int(more) if isinstance(more, (float, numpy.number)) and more == more // 1 else more
        is_given = is_control and self.config.env.id is None  # type: ignore[union-attr]
        if is_given and self._has_learned and reset_num_timesteps:
            self._session.start_over()  # the environment is the user's, who may have used it in between
        self._has_learned = True
        self._session.learn(more, name, callback=callback, model=self, show=progress_bar)
        return self

    def evaluate(self, episodes: int | None = None) -> dict[str, float]:
        """`eval/…` metrics on the first `episodes` held-out prompts, or in another environment like this one.

        Raises InputError where nothing is held out, and for an environment that was made in Python.
        """
        return self._session.evaluate(episodes, "episodes")

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        *,
        action_masks: Any = None,
    ) -> tuple[Any, Any]:
        """The action for one observation, or actions [N, ...] for N, and the memory to hand in next time.

        `state` is what the last call gave, `episode_start` [N] says where an episode begins (an LSTM forgets
        there), `action_masks` [A] or [N, A] which actions are legal, for a policy trained with masks.
        """
        if self.config.env is None:
            raise InputError("predict is for environments; a language model has generate")
        observations, is_one = batched(self.env.observation_spaces, observation, action_masks)
        self._checks({name: observations[name] for name in self.env.observation_spaces})
        noise_from = None if deterministic else self._random
        actions, state = self.policy.predict(observations, state, episode_start, noise_from=noise_from)
        actions = env_actions(self.env.action_space, actions)
        return (actions[0] if is_one else actions), state

    def save(self, folder: str | Path) -> None:
        """Write the policy; for a language model a folder that `AutoModelForCausalLM.from_pretrained` opens.

        Critic and settings lie beside the weights for `PPO.load`. Raises InputError if it cannot be written.
        """
        config, env = self.config, self.config.env
        if env is not None and env.id is None and (spec := made_from(self.env)) is not None:
            named = env.model_copy(update={"id": spec[0], "kwargs": spec[1]})  # `load` can make it too
            config = config.model_copy(update={"env": named})
        self._session.save(folder, config)

    @classmethod
    def load(cls, folder: str | Path, env: Any = None, *, verbose: int = 1, **given: Any) -> "PPO":
        """Go on from a run folder, bit for bit, or from a folder that `save` wrote.

        After `save` a language model's adapter is merged in, so the saved weights are the new reference.
        `env` is the task or environment; a run that was started from a file or an id builds its own. `given`
        is what a file cannot hold: a schedule that was a function (`learning_rate=...`), a network of your
        own (`policy=...`), demonstrations that were rows (`ptx_data=...`), and `accept_changes=True`
        where prompts, a reward's file, demonstrations or the model changed, which is refused otherwise.
        """
        named = Path(folder)
        if named.is_file():
            raise InputError(f"{named} is a file; ours are folders, and pickles are not read: train again")
        if named.suffix == ".zip" and not named.exists():  # as Stable-Baselines3 has it
            folder = named.with_suffix("")
        config, run = open_folder(folder, "PPO", is_given=env is not None)
        if run is None:
            name = str(folder) if config.env is None else config.policy.model
            if config.env is not None and config.env.id is None and env is None:
                env = load_spaces(Path(folder))
            model = cls(given.pop("policy", name), env, config=config, verbose=verbose, **given)
            model.policy.load_extras(Path(folder))
            if isinstance(model.env, Vector):
                model.env.load(Path(folder))
            return model
        source = build_task(config) if env is None and config.env is None else env
        policy = given.pop("policy", config.policy.model)
        return resume(run, cls, policy, source, config=config, verbose=verbose, **given)

    @classmethod
    def open(cls, source: str | Path, env: Any = None) -> "PPO":
        """A policy to use: the best checkpoint of a run (by its held-out metric), or any model `PPO` takes.

        `env` is for a run whose environment was made in Python.
        """
        if (Path(source) / "config.yaml").is_file():
            run = RunFolder.open(source)
            config = run.config()
            if config.opener in ("RewardModel", "RejectionSampling"):
                raise InputError(f"{source} is a run of {config.opener}, which trains no policy to use")
            model = cls(config.policy.model, env, config=config, verbose=0, run=run if config.env else None)
            restore_best(model.policy, run, model.env)
            return model
        if not (Path(source) / SETTINGS).is_file():
            return cls(str(source), verbose=0)
        saved, _ = open_folder(source, "PPO")
        if saved.env is not None:
            return cls.load(source, env, verbose=0)
        policy = saved.policy.model_copy(update={"critic": CriticConfig()})
        return cls(str(source), config=Config(policy=policy, generation=saved.generation), verbose=0)


def _put_environment(data: dict[str, Any], env: Any, settings: dict[str, Any], schedules: Schedules) -> None:
    """What is given takes precedence: an environment over an id, a number over a function."""
    if isinstance(env, TextTask):
        return merge(data, {"generation": {"chat": env.chat}})
    data["env"] = {"id": None} | (data.get("env") or {})
    if isinstance(env, str):
        data["env"]["id"] = env
    elif env is not None:
        data["env"] |= {"id": None, "n_envs": settings.get("n_envs", 1)}
        if not (settings.get("seed") is not None or "seed" in data):
            data["env"].setdefault("reseed", False)
    for value, schedule in SCHEDULED.items():
        if value in settings and value not in schedules and data.get("ppo", {}).get(schedule) == "function":
            data["ppo"][schedule] = "constant"

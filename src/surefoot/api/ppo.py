"""`PPO`: the three-line start over the parts that `py` puts together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from torch import nn

from surefoot.api import stable_baselines as sb3
from surefoot.build.control import build_control_policy, build_vector
from surefoot.build.language import build_demonstrations, build_policy, build_task, probe_functions
from surefoot.build.preflight import SETTINGS, preflight
from surefoot.build.training import build_training, restore_best
from surefoot.config import (
    NETWORKS,
    SUPERVISED,
    Config,
    absolute_paths,
    dump_config,
    load_config,
    make_config,
    nested,
    sections_for,
    with_sampling,
)
from surefoot.core.seeds import derived_seed
from surefoot.data.render import check_length, encode_prompt
from surefoot.data.rows import checked_prompt
from surefoot.envs.gym import Vector, made_from
from surefoot.envs.observations import Checks, batched
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.generation.engine import generate
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.gym import env_actions
from surefoot.rollout.mixed import MixedRollout
from surefoot.rollout.text import completion_text, text_engine
from surefoot.storage.files import whole_folder
from surefoot.storage.run_folder import RunFolder
from surefoot.train import loop
from surefoot.train.observers.watch import watched
from surefoot.types import Request, SamplingParams


class PPO:
    """Train a policy in an environment with PPO.

    For language: `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`;
    `env` a `TextTask`. For control: `policy` is `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`, `"MlpLstmPolicy"`,
    `"CnnLstmPolicy"`, or an `nn.Module` with a `features_dim` that turns observations into features; `env` a Gymnasium
    id, environment or vector environment.

    Settings are the fields of the configuration by their plain names: `learning_rate=1e-4`, `max_new_tokens=32`,
    `n_steps=128`, `seed=3`, `run_name="mine"`; `config` gives them all at once. Stable-Baselines3's keywords work as they
    do there (docs/from-sb3.md). `ptx_data` are demonstrations, a JSONL file or rows as `SFT` takes them, whose likelihood is
    part of the loss (docs/sft.md); their settings are `ptx={"coef": 0.5}`. `verbose=0` shows nothing; `run` is an existing
    run folder to go on in (`PPO.load` passes it). Raises InputError for anything unusable, before a model is loaded where
    that can be known.
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
        is_module = isinstance(policy, nn.Module) and not isinstance(env, TextTask)
        has_env = config is not None and config.env is not None
        is_control = has_env or str(policy) in NETWORKS or is_module
        of_text = "task" if config is None else config.supervised or "task"
        data = sections_for(config, "env" if is_control else of_text)
        settings, self._schedules = (
            sb3.translated(settings, verbose=verbose) if is_control else (settings, {})
        )
        merge(data, ours := nested(settings))
        if is_control:
            if env is None and config is None:
                raise InputError(
                    f"env: PPO({policy!r:.40}) needs one: a Gymnasium id, environment or vector environment"
                )
            _put_environment(data, env, settings, self._schedules)
        if ptx_data is not None:
            _put_demonstrations(data, ptx_data, is_begun=run is not None)
        if isinstance(policy, (str, Path)):
            data.setdefault("policy", {})["model"] = str(policy)
        elif not isinstance(policy, nn.Module if is_control else CausalLMPolicy):
            kind = type(policy).__name__
            raise InputError(
                f"policy: expected a model's name or folder, or what load_policy gives, got a {kind}"
            )
        if not is_control and not isinstance(env, (TextTask, type(None))):
            raise InputError(
                f"env: expected a TextTask(prompts, reward), got {env!r:.60}; for Gymnasium the policy is one of "
                f"{', '.join(NETWORKS)}, not {policy!r:.60}"
            )
        if not is_control and "env" in ours:
            name = next(iter(ours["env"]))
            raise InputError(
                f"{name}: needs an environment (Gymnasium); a text task counts episodes, leave it out"
            )
        self.config = make_config(data, where="PPO(...)")
        if self.config.supervised and env is not None:
            raise InputError(
                f"PPO: this configuration is one of supervised training; give it to {self.config.opener}"
            )
        self.verbose = verbose
        if run is None and (env is not None or is_control):
            preflight(self.config)
        ptx = self.config.ptx
        self._demonstrations = (
            build_demonstrations(ptx, ptx_data) if ptx is not None and env is not None else None
        )
        self.policy: Any
        self.env: Any
        if is_control:
            self.env = build_vector(self.config, env)
            spaces = (self.env.observation_spaces, self.env.action_space)
            self._checks = Checks(*spaces, name=self.env.name, where="predict")
            self.policy = build_control_policy(
                self.config, self.env, policy if isinstance(policy, nn.Module) else None
            )
        else:
            self.env = env
            if env is not None:
                probe_functions(env)
            self.policy = policy if isinstance(policy, CausalLMPolicy) else build_policy(self.config)
        self._folder = run
        self._training: loop.Training | None = None
        self._has_learnt = False
        self.num_timesteps = 0  # seen by callbacks
        self._random = torch.Generator().manual_seed(derived_seed(self.config.seed, "predict", 0))

    @property
    def n_envs(self) -> int:
        """Copies of the environment that are stepped together."""
        return int(self.env.num_envs) if self.config.env is not None else 1

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once `learn` has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the run that `learn` began has been trained to its end."""
        return self._training is not None and self._training.is_finished

    def learn(
        self,
        total: int | None = None,
        /,
        callback: Any = None,
        progress_bar: bool = False,
        *,
        total_episodes: int | None = None,
        total_timesteps: int | None = None,
    ) -> PPO:
        """Train for `total_episodes` (a task) or `total_timesteps` (an environment) more, or, without a number, to the end
        that was asked for last.

        `callback` is a function `(locals, globals) -> bool | None`, an `sb3.BaseCallback` or a list of them;
        `progress_bar` shows the display even where `verbose` is 0. Everything the run leaves is in `run_folder`. A new
        run starts Python's, NumPy's and torch's global generators from its seed. Raises Interrupted after SIGTERM or Ctrl-C,
        once it has saved; `learn()` then goes on.
        """
        name, named, other = ("total_episodes", total_episodes, total_timesteps)
        if self.config.env is not None:
            name, named, other = ("total_timesteps", total_timesteps, total_episodes)
        if other is not None:
            raise InputError(f"learn: this run counts {name.removeprefix('total_')}; say learn({name}=...)")
        more = total if named is None else named
        check_count(name, more)
        training = self._prepare_training()
        if more is not None:
            training.total = training.progress.collected + more
        if self._has_learnt and self.config.env is not None and self.config.env.id is None:
            self._start_over()  # the environment is the user's, who may have used it in between
        self._has_learnt = True
        with watched(training, show=bool(self.verbose or progress_bar)) as stack:
            if training.is_finished:
                return self
            stack.callback(self._count_timesteps)
            with sb3.calling(callback, self, training):
                loop.run(training)
        return self

    def evaluate(self, episodes: int | None = None) -> dict[str, float]:
        """`eval/…` metrics of the current policy on the first `episodes` held-out prompts, by default `evaluate.episodes`.

        Raises InputError without any.
        """
        check_count("episodes", episodes)
        if not (episodes := episodes or self.config.evaluate.episodes):
            raise InputError("evaluate.episodes is 0; say how many: evaluate(episodes=64)")
        if isinstance(self.env, TextTask) and not self.env.held_out:
            raise InputError(
                "no held-out prompts to evaluate on; give TextTask more prompts, or a held_out fraction or list"
            )
        training = self._prepare_training()
        if not training.rollout.can_evaluate:
            raise InputError(
                "evaluate needs an environment of its own: give PPO an id, or use evaluate_policy(model, env)"
            )
        metrics, _ = training.rollout.evaluate(episodes)
        return metrics

    @overload
    def generate(self, prompts: str, *, seed: int = 0, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Any], *, seed: int = 0, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: Any, *, seed: int = 0, **sampling: Any) -> str | list[str]:
        """Continue one prompt or several; a string each. `sampling` overrides the run's `max_new_tokens`,
        `temperature`, `top_k` and `top_p`.
        """
        if self.config.env is not None:
            raise InputError("generate is for language models; a policy for an environment has predict")
        chat = bool(getattr(self.env or self.config.task, "chat", False))
        return generate_text(self.policy, prompts, config=self.config, chat=chat, seed=seed, **sampling)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        *,
        action_masks: Any = None,
    ) -> tuple[Any, Any]:
        """The action for one observation, or actions [N, ...] for N of them, and the memory to hand in next time.

        `state` is what the last call gave, `episode_start` [N] says where an episode begins (an LSTM forgets there),
        `action_masks` [A] or [N, A] which actions are legal, for a policy trained with masks.
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
        """Write the policy: for a language model a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens.

        Critic and settings lie beside the weights for `PPO.load`. Raises InputError if the disk does not take it.
        """
        env = self.env if isinstance(self.env, Vector) else None
        save_policy(self.policy, self._nameable(), Path(folder), env)

    def _nameable(self) -> Config:
        """The configuration, with the id that Gymnasium made the environment from, if it was: then `load` can make it too."""
        env = self.config.env
        if env is None or env.id is not None or (spec := made_from(self.env)) is None:
            return self.config
        return self.config.model_copy(
            update={"env": env.model_copy(update={"id": spec[0], "kwargs": spec[1]})}
        )

    @classmethod
    def load(cls, folder: str | Path, env: Any = None, *, verbose: int = 1, **given: Any) -> PPO:
        """Go on from a run folder (bit for bit, with its optimiser and counters) or from a folder that `save` wrote.

        After `save` a language model's adapter is merged in, so the saved weights are the new reference. `env` is the task
        or environment; a run that was started from a file or an id builds its own. `given` is what a file cannot hold: a
        schedule that was a function (`learning_rate=...`), a network of your own (`policy=...`), demonstrations that were rows
        (`ptx_data=...`).
        """
        folder = Path(folder)
        if (folder / "config.yaml").is_file():
            run = RunFolder.open(folder)
            config = run.config()
            if env is None and config.env is None:
                if config.supervised:
                    use = (
                        "train its model: PPO(model, task)"
                        if config.sft
                        else "use it as a reward: TextTask(prompts, model)"
                    )
                    raise InputError(
                        f"{folder} is a supervised run; go on with {config.opener}.load, or {use}"
                    )
                if config.task is None:
                    raise InputError(
                        f"{folder} was started from Python; go on there with its task: PPO.load(folder, task)"
                    )
                env = build_task(config)
            run.hold()
            try:
                model = cls(
                    given.pop("policy", config.policy.model),
                    env,
                    config=config,
                    verbose=verbose,
                    run=run,
                    **given,
                )
                model._prepare_training()
            except BaseException:
                run.release()
                raise
            return model
        if not (folder / SETTINGS).is_file():
            raise InputError(
                f"{folder} is neither a run folder (config.yaml) nor a model that Surefoot saved ({SETTINGS})"
            )
        config = load_config(folder / SETTINGS)
        name = str(folder) if config.env is None else config.policy.model
        model = cls(given.pop("policy", name), env, config=config, verbose=verbose, **given)
        model.policy.load_extras(folder)
        if isinstance(model.env, Vector):
            model.env.load(folder)
        return model

    @classmethod
    def open(cls, source: str | Path, env: Any = None) -> PPO:
        """A policy to use: the best checkpoint of a run (by its held-out metric), or any model `PPO` takes.

        `env` is for a run whose environment was made in Python.
        """
        if (Path(source) / "config.yaml").is_file():
            run = RunFolder.open(source)
            config = run.config()
            if config.reward_model is not None:
                raise InputError(
                    f"{source} is a reward model's run, which writes nothing; open it with RewardModel.load"
                )
            model = cls(
                config.policy.model,
                env,
                config=config,
                verbose=0,
                run=run if config.env is not None else None,
            )
            restore_best(model.policy, run, model.env)
            return model
        settings = Path(source) / SETTINGS
        if settings.is_file() and load_config(settings).env is not None:
            return cls.load(source, env, verbose=0)
        return cls(str(source), verbose=0)

    def _prepare_training(self) -> loop.Training:
        if self._training is None:
            if self.env is None:
                raise InputError("there is no task to train on; give PPO a TextTask as its second argument")
            self._training = build_training(
                self.config, self.policy, self.env, self._folder, demonstrations=self._demonstrations
            )
            if (
                isinstance(rollout := self._training.rollout, MixedRollout)
                and rollout.notice
                and self.verbose
            ):
                print(rollout.notice)
            self._training.schedules = self._schedules
            self._folder = self._training.folder
            self._count_timesteps()
        return self._training

    def _count_timesteps(self) -> None:
        """Callbacks count steps as they go; a rollout that was given up leaves its steps out."""
        if self._training is not None and self.config.env is not None:
            self.num_timesteps = self._training.progress.collected

    def _start_over(self) -> None:
        """Let training begin new episodes: its environment was used for something else."""
        if self._training is not None:
            self._training.rollout.start_over()  # type: ignore[attr-defined]


def save_policy(policy: Any, config: Config, folder: Path, env: Vector | None = None) -> None:
    """Write the policy, its settings and what `env` keeps. Raises InputError if the disk does not take it."""
    try:
        # A new folder appears when it is whole; one that exists is written into.
        with contextlib.nullcontext(folder) if folder.exists() else whole_folder(folder) as place:
            policy.save(place)
            if env is not None:
                env.save(place)
            # Without `run` and the supervised sections: what is trained from it is another run.
            settings = dump_config(absolute_paths(config), exclude={"run", "new_model", *SUPERVISED})
            (place / SETTINGS).write_text(settings, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} could not be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def generate_text(
    policy: CausalLMPolicy,
    prompts: Any,
    *,
    config: Config,
    chat: bool = False,
    seed: int = 0,
    **sampling: Any,
) -> str | list[str]:
    """Continue a prompt (a string comes back) or a list of prompts, strings or messages (a list comes back)."""
    settings = with_sampling(config.generation, sampling)
    params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    if not isinstance(prompts, (str, Sequence)):
        raise InputError(f"prompts: expected a string or a list of prompts, got {type(prompts).__name__}")
    many = [prompts] if isinstance(prompts, str) else prompts
    engine = text_engine(policy, settings)
    requests = []
    for number, prompt in enumerate(many):
        checked = checked_prompt(
            prompt, "generate" if isinstance(prompts, str) else f"generate, prompt {number + 1}"
        )
        tokens = encode_prompt(policy.tokenizer, checked, chat=chat)
        check_length(tokens, str(checked), context=policy.context_length, new_tokens=params.max_new_tokens)
        seed_of_prompt = derived_seed(seed, "generate", number)
        requests.append(Request(tokens, seed_of_prompt, params, tuple(settings.stop)))
    texts = [completion_text(policy, completion) for completion in generate(engine, requests)]
    return texts[0] if isinstance(prompts, str) else texts


def check_count(name: str, value: int | None) -> None:
    """Raise InputError unless `value` is None or a whole number above 0."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InputError(f"{name}: expected a whole number above 0, got {value!r}")


def merge(data: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into nested `data`, section by section; an adapter's settings stand together."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict) and key != "adapter":
            merge(data[key], value)
        else:
            data[key] = value


def _put_environment(
    data: dict[str, Any], env: Any, settings: dict[str, Any], schedules: dict[str, Any]
) -> None:
    """What is given goes before what the configuration names: an environment, a number where there was a function."""
    data["env"] = {"id": None} | (data.get("env") or {})
    if isinstance(env, str):
        data["env"]["id"] = env
    elif env is not None:
        data["env"] |= {"id": None, "n_envs": settings.get("n_envs", 1)}
    for value, schedule in sb3.SCHEDULED.items():
        if value in settings and value not in schedules and data.get("ppo", {}).get(schedule) == "function":
            data["ppo"][schedule] = "constant"


def _put_demonstrations(data: dict[str, Any], ptx_data: Any, *, is_begun: bool) -> None:
    """What is given goes before the file that the configuration names; for a run that goes on, its own name for it stays."""
    if is_begun and data.get("ptx") is None:
        raise InputError(
            "ptx_data: this run was begun without demonstrations; go on without, or begin another"
        )
    if not is_begun:
        data["ptx"] = (data.get("ptx") or {}) | {
            "data": str(ptx_data) if isinstance(ptx_data, (str, Path)) else None
        }

"""`PPO`: the three-line start over the parts that `build.py` puts together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError
from safetensors.torch import save_file

from surefoot import build
from surefoot.config import Config, absolute_paths, dump_config, load_config, make_config, nested, with_sampling
from surefoot.core.seeds import derived_seed
from surefoot.envs.text import TextTask, checked_prompt
from surefoot.errors import InputError
from surefoot.generation.engine import generate
from surefoot.policies.lm import CausalLMPolicy
from surefoot.rollout.text import check_length, completion_text, encode_prompt, stop_check
from surefoot.run import RunFolder
from surefoot.train import checkpoint, loop
from surefoot.train.display import Display, TensorBoard
from surefoot.types import Request, SamplingParams

# Written beside the weights by `save`, so that `load` gives back critic and settings too.
SETTINGS, CRITIC = "surefoot.yaml", "surefoot_critic.safetensors"


class PPO:
    """Train a policy on a task with PPO.

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`; `env` a
    `TextTask`. Settings are the fields of the configuration by their plain names: `learning_rate=1e-4`,
    `max_new_tokens=32`, `adapter=None`, `seed=3`, `run_name="mine"`; `config` gives them all at once. `verbose=0`
    shows nothing; `run` is an existing run folder to go on in (`PPO.load` passes it). Raises
    InputError for anything unusable, before the model is loaded where that can be known.
    """

    def __init__(
        self,
        policy: str | Path | CausalLMPolicy,
        env: TextTask | None = None,
        *,
        config: Config | None = None,
        verbose: int = 1,
        run: RunFolder | None = None,
        **settings: Any,
    ):
        data = config.model_dump() if config is not None else {}
        _merge(data, nested(settings))
        if isinstance(policy, (str, Path)):
            data.setdefault("policy", {})["model"] = str(policy)
        elif not isinstance(policy, CausalLMPolicy):
            kind = type(policy).__name__
            raise InputError(f"policy: expected a model's name or folder, or what load_policy gives, got a {kind}")
        if not isinstance(env, (TextTask, type(None))):
            raise InputError(f"env: expected a TextTask(prompts, reward), got {env!r:.60}")
        self.config = make_config(data, where="PPO(...)")
        self.env, self.verbose = env, verbose
        if env is not None:
            if run is None:
                build.check_places(self.config)
            build.probe_functions(env)
        self.policy = policy if isinstance(policy, CausalLMPolicy) else build.build_policy(self.config)
        self.policy.temperature = self.config.generation.temperature
        self._folder = run
        self._training: loop.Training | None = None

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once `learn` has begun."""
        return self._folder.path if self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether the run that `learn` began has been trained to its end."""
        return self._training is not None and self._training.is_finished

    def learn(self, total_episodes: int | None = None) -> PPO:
        """Train for `total_episodes` more, or, without a number, to the end that was asked for last.

        Everything the run leaves is in `run_folder`. A new run starts Python's, NumPy's and torch's global generators
        from its seed. Raises Interrupted after SIGTERM or Ctrl-C, once it has saved; `learn()` then goes on.
        """
        _check_count("total_episodes", total_episodes)
        training = self._prepare_training()
        if total_episodes is not None:
            training.total_episodes = training.progress.episodes + total_episodes
        with ExitStack() as stack:
            self._hold_again(training)
            stack.callback(training.folder.release)
            if training.is_finished:
                return self
            board = TensorBoard(training.folder.path / "tensorboard", purge_from=training.progress.updates + 1)
            stack.callback(board.close)
            training.observers = [board]
            if self.verbose:
                training.observers.append(stack.enter_context(Display(training.total_updates)))
            loop.run(training)
        return self

    def evaluate(self, episodes: int | None = None) -> dict[str, float]:
        """`eval/…` metrics of the current policy on held-out prompts. Raises InputError without any."""
        _check_count("episodes", episodes)
        if self.env is not None and not self.env.held_out:
            raise InputError("no held-out prompts to evaluate on; give TextTask more prompts, or a held_out fraction or list")
        training = self._prepare_training()
        metrics, _ = training.rollout.evaluate(episodes or self.config.evaluate.episodes)
        return metrics

    @overload
    def generate(self, prompts: str, *, seed: int = 0, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Any], *, seed: int = 0, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: Any, *, seed: int = 0, **sampling: Any) -> str | list[str]:
        """Continue one prompt or several; a string each. `sampling` overrides the run's `max_new_tokens`,
        `temperature`, `top_k` and `top_p`.
        """
        task = self.env or self.config.task
        return generate_text(self.policy, prompts, config=self.config, chat=task.chat if task else False, seed=seed, **sampling)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: `AutoModelForCausalLM.from_pretrained(folder)` opens it.

        Critic and settings lie beside the weights for `PPO.load`. Raises InputError if the disk does not take it.
        """
        folder = Path(folder)
        # A new folder appears when it is whole; one that exists is written into.
        aside = folder if folder.exists() else folder.with_name(folder.name + ".tmp")
        try:
            if aside != folder:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.policy.save(aside)
            self.policy.tokenizer.save_pretrained(aside)
            save_file({name: p.data.contiguous() for name, p in self.policy.value_head.state_dict().items()}, aside / CRITIC)
            # Without `run`: what is trained from it is another run.
            (aside / SETTINGS).write_text(dump_config(absolute_paths(self.config), exclude={"run"}), encoding="utf-8")
            os.replace(aside, folder)
        except (OSError, SafetensorError) as error:
            if aside != folder:
                shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"{folder} could not be written: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def load(cls, folder: str | Path, env: TextTask | None = None, *, verbose: int = 1) -> PPO:
        """Go on from a run folder (bit for bit, with its optimiser and counters) or from a folder that `save` wrote.

        After `save` the adapter is merged in, so the saved weights are the new reference. `env` is the task; a run
        that was started from a file builds its own.
        """
        folder = Path(folder)
        if (folder / "config.yaml").is_file():
            run = RunFolder.open(folder)
            config = run.config()
            if env is None and config.task is None:
                raise InputError(f"{folder} was started from Python; continue it there with its task: PPO.load(folder, task)")
            env = env or build.build_task(config)
            run.hold()
            model = cls(config.policy.model, env, config=config, verbose=verbose, run=run)
            model._prepare_training()
            return model
        if not (folder / SETTINGS).is_file():
            raise InputError(f"{folder} is neither a run folder (config.yaml) nor a model that Surefoot saved ({SETTINGS})")
        model = cls(str(folder), env, config=load_config(folder / SETTINGS), verbose=verbose)
        try:
            model.policy.value_head.load_state_dict(checkpoint.read_tensors(folder / CRITIC))
        except RuntimeError as error:  # torch's, for other names or shapes
            raise InputError(f"{folder / CRITIC} does not fit this model: {' '.join(str(error).split())}") from None
        return model

    @classmethod
    def open(cls, source: str | Path) -> PPO:
        """A policy to write with: the best checkpoint of a run (by its held-out metric), or any model `PPO` takes."""
        if (Path(source) / "config.yaml").is_file():
            run = RunFolder.open(source)
            config = run.config()
            model = cls(config.policy.model, config=config, verbose=0)
            build.restore_for_generation(model.policy, run)
            return model
        return cls(str(source), verbose=0)

    def _prepare_training(self) -> loop.Training:
        if self._training is None:
            if self.env is None:
                raise InputError("there is no task to train on; give PPO a TextTask as its second argument")
            self._training = build.build_training(self.config, self.policy, self.env, self._folder)
            self._folder = self._training.folder
        return self._training

    def _hold_again(self, training: loop.Training) -> None:
        """Take the run folder, which is free between two `learn`s. Raises InputError if it was used in between."""
        if training.folder.is_held:
            return
        training.folder.hold()
        newest = checkpoint.newest_checkpoint(training.folder.checkpoints)
        if newest is not None and checkpoint.number_of(newest) > training.progress.updates:
            training.folder.release()
            raise InputError(f"{training.folder.path} has gone on elsewhere, to {newest.name}; open it with PPO.load")


def generate_text(
    policy: CausalLMPolicy, prompts: Any, *, config: Config, chat: bool = False, seed: int = 0, **sampling: Any
) -> str | list[str]:
    """Continue a prompt (a string comes back) or a list of prompts, strings or messages (a list comes back)."""
    settings = with_sampling(config.generation, sampling)
    params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    if not isinstance(prompts, (str, Sequence)):
        raise InputError(f"prompts: expected a string or a list of prompts, got {type(prompts).__name__}")
    many = [prompts] if isinstance(prompts, str) else prompts
    is_stopped = stop_check(policy.tokenizer, settings.stop)
    ends = policy.model_end_tokens | frozenset(settings.stop_token_ids)
    requests = []
    for number, prompt in enumerate(many):
        checked = checked_prompt(prompt, "generate" if isinstance(prompts, str) else f"generate, prompt {number + 1}")
        tokens = encode_prompt(policy.tokenizer, checked, chat=chat)
        check_length(tokens, str(checked), context=policy.context_length, new_tokens=params.max_new_tokens)
        requests.append(Request(tokens, derived_seed(seed, "generate", number), is_stopped))
    completions = generate(policy, requests, params=params, end_tokens=ends, slots=settings.slots)
    texts = [completion_text(policy.tokenizer, completion.tokens, ends) for completion in completions]
    return texts[0] if isinstance(prompts, str) else texts


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise InputError(f"{name}: expected a whole number above 0, got {value!r}")


def _merge(data: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict) and key != "adapter":
            _merge(data[key], value)
        else:
            data[key] = value

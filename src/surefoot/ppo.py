"""`PPO`: the three-line start over the parts that `build.py` puts together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import yaml
from safetensors.torch import load_file, save_file

from surefoot import build
from surefoot.config import Config, load_config, make_config, nested
from surefoot.core.seeds import derived_seed
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.generation.engine import generate
from surefoot.policies.lm import CausalLMPolicy
from surefoot.rollout.text import completion_text, encode_prompt
from surefoot.run import RunFolder
from surefoot.train import loop
from surefoot.train.display import Display, TensorBoard
from surefoot.types import Request, SamplingParams

# Written beside the weights by `save`, so that `load` gives back critic and settings too.
SETTINGS, CRITIC = "surefoot.yaml", "surefoot_critic.safetensors"


class PPO:
    """Train a policy on a task with PPO.

    `policy` is an asset's name, a local model folder, a Hugging Face hub id or a loaded `CausalLMPolicy`; `env` a
    `TextTask`. Settings are the fields of the configuration by their plain names: `learning_rate=1e-4`,
    `max_new_tokens=32`, `adapter=None`, `seed=3`, `run_name="mine"`; `config` gives them all at once. `verbose=0`
    shows nothing; `run` is an existing run folder to go on in (`PPO.load` passes it). Raises InputError for anything unusable, before the model is loaded where that can be known.
    """

    def __init__(
        self,
        policy: str | CausalLMPolicy,
        env: TextTask | None = None,
        *,
        config: Config | None = None,
        verbose: int = 1,
        run: RunFolder | None = None,
        **settings: Any,
    ):
        data = config.model_dump() if config is not None else {}
        _merge(data, nested(settings))
        if isinstance(policy, str):
            data.setdefault("policy", {})["model"] = policy
        self.config = make_config(data, where="PPO(...)")
        self.env, self.verbose = env, verbose
        if env is not None:
            if run is None:
                RunFolder.check_free(self.config)
            build.probe_functions(env)
        self.policy = build.build_policy(self.config) if isinstance(policy, str) else policy
        self.policy.temperature = self.config.generation.temperature
        self._folder = run
        self._training: loop.Training | None = None

    @property
    def run_folder(self) -> Path | None:
        """Where the run lies, once `learn` has begun."""
        return self._folder.path if self._folder else None

    def learn(self, total_episodes: int | None = None) -> PPO:
        """Train for `total_episodes` more, or, without a number, to the end of the configured run.

        Everything the run leaves is in `run_folder`. Raises Interrupted after SIGTERM or Ctrl-C, once it has saved.
        """
        training = self._prepare_training()
        if total_episodes is not None:
            training.total_episodes = training.progress.episodes + total_episodes
        board = TensorBoard(training.folder.path / "tensorboard", purge_from=training.progress.updates + 1)
        with ExitStack() as stack:
            stack.callback(board.close)
            training.observers = [board]
            if self.verbose:
                training.observers.append(stack.enter_context(Display(training.total_updates)))
            loop.run(training)
        return self

    def evaluate(self, episodes: int | None = None) -> dict[str, float]:
        """`eval/…` metrics of the current policy on held-out prompts. Raises InputError without any."""
        training = self._prepare_training()
        if not training.rollout.can_evaluate:
            raise InputError("no held-out prompts to evaluate on; give TextTask a held_out fraction or list")
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
        return generate_text(self.policy, prompts, config=self.config, seed=seed, **sampling)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: `AutoModelForCausalLM.from_pretrained(folder)` opens it.

        Critic and settings lie beside the weights for `PPO.load`. Raises InputError if the disk does not take it.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.policy.save(folder)
            self.policy.tokenizer.save_pretrained(folder)
            save_file({name: p.data.contiguous() for name, p in self.policy.value_head.state_dict().items()}, folder / CRITIC)
            settings = self.config.model_dump(mode="json")
            (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))
        except OSError as error:
            raise InputError(f"{folder} could not be written: {error.strerror or error}") from error

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
            env = env or build.build_task(config)
            run.hold()
            model = cls(config.policy.model, env, config=config, verbose=verbose, run=run)
            model._prepare_training()
            return model
        if not (folder / SETTINGS).is_file():
            raise InputError(f"{folder} is neither a run folder (config.yaml) nor a model that Surefoot saved ({SETTINGS})")
        model = cls(str(folder), env, config=load_config(folder / SETTINGS), verbose=verbose)
        model.policy.value_head.load_state_dict(load_file(folder / CRITIC))
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
        # No adapter: nothing is trained, so no second set of weights is needed either.
        return cls(str(source), adapter=None, verbose=0)

    def _prepare_training(self) -> loop.Training:
        if self._training is None:
            if self.env is None:
                raise InputError("there is no task to train on; give PPO a TextTask as its second argument")
            if self._folder is None:
                self._folder = RunFolder.create(self.config)
            self._training = build.build_training(self.config, self.policy, self.env, self._folder)
        return self._training


def generate_text(policy: CausalLMPolicy, prompts: Any, *, config: Config, seed: int = 0, **sampling: Any) -> str | list[str]:
    """Continue a prompt (a string comes back) or a list of prompts, strings or messages (a list comes back)."""
    settings = config.generation
    allowed = {"max_new_tokens", "temperature", "top_k", "top_p"}
    if sampling.keys() - allowed:
        raise InputError(f"unknown sampling setting {sorted(sampling.keys() - allowed)[0]!r}; there are {sorted(allowed)}")
    params = SamplingParams(**({"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature} | sampling))
    many = [prompts] if isinstance(prompts, str) else list(prompts)
    chat = config.task.chat if config.task else False
    ends = policy.model_end_tokens | frozenset(settings.stop_token_ids)
    requests = [
        Request(encode_prompt(policy.tokenizer, prompt, chat=chat), derived_seed(seed, "generate", number))
        for number, prompt in enumerate(many)
    ]
    if any(not request.prompt for request in requests):
        raise InputError("a prompt is empty; give it text")
    completions = generate(policy, requests, params=params, end_tokens=ends, slots=settings.slots)
    texts = [completion_text(policy.tokenizer, completion.tokens, ends) for completion in completions]
    return texts[0] if isinstance(prompts, str) else texts


def _merge(data: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict) and key != "adapter":
            _merge(data[key], value)
        else:
            data[key] = value

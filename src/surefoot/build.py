"""Config -> objects. The only file that knows every class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from surefoot import assets
from surefoot.config import Config
from surefoot.core.seeds import derived_seed
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.lm import CausalLMPolicy, check_model_folder, load_policy
from surefoot.rewards.functions import load_function, score
from surefoot.rollout.text import TextRollout
from surefoot.run import RunFolder
from surefoot.train import checkpoint, loop
from surefoot.train.update import make_optimizer
from surefoot.types import Completion, StopReason, Trajectory


def build_device(name: str) -> str:
    """The device `config.device` means here. Raises InputError for one this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise InputError(f"device: {name} is not available here; use device: auto or cpu")
    return name


def check_places(config: Config) -> None:
    """What a new run can be refused for before anything is fetched or loaded: run name, device, model folder."""
    RunFolder.check_free(config)
    build_device(config.device)
    if config.policy.model not in assets.ASSETS:
        check_model_folder(config.policy.model)


def build_policy(config: Config, *, say: Callable[[str], None] = assets.tell) -> CausalLMPolicy:
    """The policy of a run, fetched if need be."""
    device = build_device(config.device)
    source = assets.resolve(config.policy.model, say=say)
    check_model_folder(source)
    if not os.path.exists(source):
        say(f"{source} is no folder here and no asset ({', '.join(assets.ASSETS)}): asking the Hugging Face hub for it")
    return load_policy(
        source,
        config.policy,
        device=device,
        temperature=config.generation.temperature,
        seed=derived_seed(config.seed, "adapter", 0),
    )


def build_task(config: Config, *, say: Callable[[str], None] = assets.tell) -> TextTask:
    """The task of a run. Functions are found before prompts are fetched, and both before any model is loaded."""
    task = config.task
    if task is None:
        raise InputError("the configuration has no task; name task.prompts and task.reward")
    reward = load_function(task.reward, key="task.reward")
    metric = load_function(task.metric, key="task.metric") if task.metric else None
    return TextTask(
        assets.resolve(task.prompts, key="task.prompts", say=say),
        reward,
        metric=metric,
        held_out=task.held_out,
        prompt_column=task.prompt_column,
        prompt_tokens=task.prompt_tokens,
        chat=task.chat,
    )


def build_training(config: Config, policy: CausalLMPolicy, task: TextTask, folder: RunFolder | None = None) -> loop.Training:
    """A run at its beginning, in a new folder where none is given, or at the newest whole checkpoint of its folder."""
    rollout = TextRollout(policy, task, generation=config.generation, ppo=config.ppo, seed=config.seed)
    folder = folder or RunFolder.create(config)  # after the prompts were found to fit: a refused run leaves nothing
    training = loop.Training(
        config=config,
        policy=policy,
        rollout=rollout,
        optimizer=make_optimizer(policy, config.ppo),
        folder=folder,
        progress=loop.Progress(kl_coef=config.ppo.kl_coef),
        total_episodes=config.ppo.total_episodes,
    )
    newest = checkpoint.newest_checkpoint(folder.checkpoints)
    if newest is not None:
        loop.restore(training, newest)
    else:
        folder.cut_logs({})
    return training


def probe_functions(task: TextTask) -> None:
    """Call reward and metric on two made-up answers: a broken one should fail now, not after a rollout.

    Raises InputError as `rewards.functions.score` does.
    """
    examples = (task.train * 2)[:2]
    trajectories = [
        Trajectory(
            prompt=example.prompt,
            prompt_tokens=(0,),
            completion=Completion([0], [0.0], [0.0], [0.0], StopReason.LENGTH),
            text=text,
            columns=example.columns,
        )
        for example, text in zip(examples, ("A short answer.", ""), strict=True)
    ]
    generators = checkpoint.generator_states()
    score(task.reward, trajectories)
    if task.metric is not None:
        score(task.metric, trajectories, name="metric")
    checkpoint.restore_generators(generators)


def restore_for_generation(policy: CausalLMPolicy, folder: RunFolder) -> Path:
    """Load the run's best weights (by the held-out metric), else its newest; the checkpoint they came from.

    Raises InputError if the run has none yet: untrained answers must not pass for its own.
    """
    path = checkpoint.pointed_checkpoint(folder.checkpoints, "best") or checkpoint.newest_checkpoint(folder.checkpoints)
    if path is None:
        raise InputError(f"{folder.path} has no checkpoint yet; wait for its first one")
    tensors, _ = checkpoint.load_checkpoint(path)
    checkpoint.restore_policy(policy, tensors["policy"])
    return path

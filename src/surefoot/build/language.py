"""Config -> a text task: its prompts, its rewards, the reward models among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surefoot.build.training import SETTINGS, build_device, model_of_run
from surefoot.config import Config, PolicyConfig, RewardPart, load_config
from surefoot.data import assets
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.lm.policy import load_policy
from surefoot.policies.lm.pretrained import REWARD
from surefoot.policies.lm.reward_model import RewardModelPolicy, saved_heads
from surefoot.rewards.functions import RewardFunction, compute_rewards, is_function, load_function
from surefoot.rewards.mixed import MixedReward, assign_rewards
from surefoot.rollout.preferences import NO_UNCERTAINTY, RewardScorer
from surefoot.train import checkpoint
from surefoot.types import Completion, StopReason, Trajectory


def build_task(config: Config, *, say: Callable[[str], None] = assets.tell) -> TextTask:
    """The task of a run. Rewards are found before prompts are fetched; reward models are loaded when they are first asked."""
    task = config.task
    if task is None:
        raise InputError("the configuration has no task; name task.prompts and task.reward")
    reward = build_rewards(task.reward, config.device)
    metric = build_reward(RewardPart(name=task.metric), "task.metric", config.device) if task.metric else None
    return TextTask(
        assets.resolve(task.prompts, key="task.prompts", say=say),
        reward,
        metric=metric,
        held_out=task.held_out,
        prompt_column=task.prompt_column,
        prompt_tokens=task.prompt_tokens,
        chat=task.chat,
    )


def build_rewards(reward: str | list[RewardPart], device: str) -> RewardFunction | MixedReward:
    """The one reward that `task.reward` names, or the sum of its parts."""
    if isinstance(reward, str):
        return build_reward(RewardPart(name=reward), "task.reward", device)
    functions = {part.called: build_reward(part, f"task.reward, {part.called}", device) for part in reward}
    return MixedReward({part.called: (functions[part.called], part.weight) for part in reward})


def build_reward(part: RewardPart, key: str, device: str) -> RewardFunction:
    """The Python function, or the reward model's folder, that `part` names. Raises InputError naming `key`.

    A reward model is loaded when it is first asked: what else is wrong with a run is found before.
    """
    if Path(part.name).is_dir():
        return _reward_of_model(part, key, device)
    if part.uncertainty:
        raise InputError(
            f"{key}: uncertainty is of a reward model's folder, and {part.name!r:.60} is none; leave it out"
        )
    if not is_function(part.name):
        raise InputError(
            f"{key}: expected 'file.py:function' or 'package.module:function', got {part.name!r}; "
            "nor is it a reward model's folder"
        )
    return load_function(part.name, key=key)


def _reward_of_model(part: RewardPart, key: str, device: str) -> RewardFunction:
    folder = _reward_folder(part.name, key)
    if saved_heads(folder) == 1 and part.uncertainty:
        raise InputError(f"{key}: {NO_UNCERTAINTY}")

    @functools.cache
    def scorer() -> RewardScorer:
        return RewardScorer(load_reward(folder, device=device, key=key), uncertainty=part.uncertainty)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return scorer()(prompts, completions)

    return reward


def load_reward(folder: str | Path, *, device: str = "auto", key: str = "reward model") -> RewardModelPolicy:
    """The reward model that lies in `folder`, its run folder or what `save` wrote. Raises InputError naming `key`."""
    folder = _reward_folder(folder, key)
    settings = PolicyConfig(adapter=None, dtype=load_config(folder / SETTINGS).policy.dtype)
    heads = saved_heads(folder)
    policy = RewardModelPolicy(
        load_policy(str(folder), settings, device=build_device(device)), seed=0, heads=heads
    )
    policy.load_head(folder)
    return policy


def _reward_folder(folder: str | Path, key: str) -> Path:
    """Where in `folder` the reward model is."""
    folder = Path(model_of_run(str(folder)))
    if not (folder / REWARD).is_file():
        raise InputError(
            f"{key}: no reward model in {folder}, which would have a {REWARD}; train it to its end, or save it"
        )
    return folder


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
    assign_rewards(task.reward, trajectories)
    if task.metric is not None:
        compute_rewards(task.metric, trajectories, name="metric")
    checkpoint.restore_generators(generators)

"""Config -> what a language model learns with: the policy, the task and its rewards, examples and
preferences.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from surefoot.build.preflight import SETTINGS, build_device, model_of_run
from surefoot.config import (
    Config,
    CriticConfig,
    PolicyConfig,
    PTXConfig,
    RewardPart,
    SFTConfig,
    TaskConfig,
    load_config,
)
from surefoot.core.seeds import derived_seed
from surefoot.data import assets
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.preferences import PreferenceDataset
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.lm.policy import CausalLMPolicy, load_policy
from surefoot.policies.lm.pretrained import REWARD, check_model_folder
from surefoot.policies.lm.reward_model import RewardModelPolicy
from surefoot.rewards.functions import RewardFunction, compute_rewards, is_function, load_function
from surefoot.rewards.mixed import MixedReward, assign_rewards
from surefoot.rewards.model import RewardScorer
from surefoot.train import checkpoint
from surefoot.types import StopReason, Trajectory, Turn


def build_policy(config: Config, *, log: Callable[[str], None] = assets.log_to_stderr) -> CausalLMPolicy:
    """The policy of a run, fetched if need be."""
    device = build_device(config.device)
    source = assets.resolve(config.policy.model, log=log)
    check_model_folder(source)
    if not os.path.exists(source):
        log(
            f"{source} is no folder here and no asset ({', '.join(assets.ASSETS)}): "
            "asking the Hugging Face hub for it"
        )
    return load_policy(
        source,
        config.policy.model_copy(update={"critic": _critic(config, log)}),
        device=device,
        seed=derived_seed(config.seed, "adapter", 0),
    )


def _critic(config: Config, log: Callable[[str], None]) -> CriticConfig:
    """The critic that is built: the default where no values are learned, and its model as a folder."""
    critic = config.policy.critic
    if not config.ppo.has_critic:
        return CriticConfig()
    if critic.model is None:
        return critic
    source = model_of_run(assets.resolve(critic.model, key="policy.critic.model", log=log))
    return critic.model_copy(update={"model": source})


def build_reward_policy(config: Config, trunk: CausalLMPolicy) -> RewardModelPolicy:
    """A reward model over a language model, which it takes over."""
    check_no_critic(trunk)
    check_critic(trunk, config.policy.critic)
    assert config.reward_model is not None
    return RewardModelPolicy(trunk, seed=derived_seed(config.seed, "reward head", 0))


def check_critic(policy: Any, critic: CriticConfig) -> None:
    """Raise InputError for a loaded policy that lacks what `policy.critic` asks for."""
    if isinstance(policy, CausalLMPolicy):
        lacks_own = critic.kind != "shared" and policy.critic is None
        if lacks_own or (critic.stop_gradient and not policy.stop_gradient):
            raise InputError(
                "policy: it was loaded without what policy.critic asks for; give load_policy the same "
                "PolicyConfig(critic=...)"
            )


def check_no_critic(policy: Any) -> None:
    """Raise InputError for a loaded policy that brings a critic's weights along to where no values are
    learned.
    """
    if getattr(policy, "critic", None) is not None:
        raise InputError(
            "policy: it has a separate critic, which this run would not train; "
            "load it with critic.kind: shared"
        )


def build_preferences(config: Config, data: Any = None) -> PreferenceDataset:
    """The preferences of a run: `data`, or what `reward_model.data` names.

    Raises InputError for what says nothing.
    """
    settings = config.reward_model
    assert settings is not None
    if data is None:
        if settings.data is None:
            raise InputError(
                "reward_model.data is missing: name a JSONL file of pairs or ratings, or give them in Python"
            )
        data = settings.data
    preferences = PreferenceDataset(data, held_out=settings.held_out, rating_range=settings.rating_range)
    if preferences.of_pairs and settings.rating_range is not None:
        raise InputError("reward_model.rating_range is for ratings, and these are pairs; leave it out")
    if settings.center and not preferences.of_pairs:
        raise InputError("reward_model.center is for pairs, and these are ratings; leave it out")
    return preferences


def build_demonstrations(
    settings: SFTConfig | PTXConfig, data: Any = None, *, log: Callable[[str], None] = assets.log_to_stderr
) -> Demonstrations:
    """The examples of a run: `data`, or what the section names.

    Raises InputError for what cannot be learned from.
    """
    is_sft = isinstance(settings, SFTConfig)
    key, given = ("sft.data", "data") if is_sft else ("ptx.data", "ptx_data")
    if data is None:
        if settings.data is None:
            raise InputError(
                f"{key} is missing: name a JSONL file of examples; what was given in Python ({given}), "
                "give again"
            )
        data = assets.resolve(settings.data, key=key, log=log)
    return Demonstrations(
        data, held_out=settings.held_out, columns=settings.columns, name="data" if is_sft else key
    )


def build_task(config: Config, *, log: Callable[[str], None] = assets.log_to_stderr) -> TextTask:
    """The task of a run.

    Rewards are found before prompts are fetched; reward models are loaded when they are first asked.
    """
    task = config.task
    if task is None:
        raise InputError("the configuration has no task; name task.prompts and task.reward")

    def build(part: RewardPart, key: str) -> RewardFunction:
        return build_reward(part, key, config.device)

    reward = build_rewards(task.reward, build)
    metric = None if task.metric is None else build(RewardPart(name=task.metric), "task.metric")
    return _task(task, reward, metric, log=log)


def _task(
    settings: TaskConfig,
    reward: RewardFunction | MixedReward,
    metric: RewardFunction | None,
    *,
    log: Callable[[str], None] = assets.log_to_stderr,
) -> TextTask:
    fields = settings.model_dump(include={"held_out", "prompt_column", "prompt_tokens", "chat"})
    prompts = assets.resolve(settings.prompts, key="task.prompts", log=log)
    return TextTask(prompts, reward, metric=metric, **fields)


def build_rewards(
    reward: str | list[RewardPart], build: Callable[[RewardPart, str], RewardFunction]
) -> RewardFunction | MixedReward:
    """The one reward that `task.reward` names, or the sum of its parts; `build` makes each, as `build_reward`
    does.
    """
    if isinstance(reward, str):
        return build(RewardPart(name=reward), "task.reward")
    return MixedReward(
        {part.called: (build(part, f"task.reward, {part.called}"), part.weight) for part in reward}
    )


def build_reward(part: RewardPart, key: str, device: str) -> RewardFunction:
    """The Python function, or the reward model's folder, that `part` names. Raises InputError naming `key`.

    A reward model is loaded when it is first asked: what else is wrong with a run is found before.
    """
    if Path(part.name).is_dir():
        return _reward_of_model(part, key, device)
    if not is_function(part.name):
        raise InputError(
            f"{key}: expected 'file.py:function' or 'package.module:function', got {part.name!r}; "
            "nor is it a reward model's folder"
        )
    return load_function(part.name, key=key)


def _reward_of_model(part: RewardPart, key: str, device: str) -> RewardFunction:
    folder = _reward_folder(part.name, key)

    @functools.cache
    def scorer() -> RewardScorer:
        return RewardScorer(load_reward(folder, device=device, key=key))

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return scorer()(prompts, completions)

    return reward


def load_reward(folder: str | Path, *, device: str = "auto", key: str = "reward model") -> RewardModelPolicy:
    """The reward model that lies in `folder`, its run folder or what `save` wrote.

    Raises InputError naming `key`.
    """
    folder = _reward_folder(folder, key)
    settings = PolicyConfig(adapter=None, dtype=load_config(folder / SETTINGS).policy.dtype)
    policy = RewardModelPolicy(load_policy(str(folder), settings, device=build_device(device)), seed=0)
    policy.load_head(folder)
    return policy


def _reward_folder(folder: str | Path, key: str) -> Path:
    """Where in `folder` the reward model is."""
    folder = Path(model_of_run(str(folder)))
    if not (folder / REWARD).is_file():
        raise InputError(
            f"{key}: no reward model in {folder}, which would have a {REWARD}; "
            "train it to its end, or save it"
        )
    return folder


def check_sources(config: Config, *, made: Collection[str]) -> TextTask | None:
    """Read whatever a run learns from, but for paths that will have been `made` by then; the task, if its
    prompts are there.

    Raises InputError for what cannot be learned from, and for rewards that fail. Reward models are not
    loaded: stand-ins take their place.
    """
    for section in (config.sft, config.ptx):
        if section is not None and section.data not in made:
            build_demonstrations(section)
    if config.reward_model is not None and config.reward_model.data not in made:
        build_preferences(config)
    if (settings := config.task) is None:
        return None

    def checked(part: RewardPart, key: str) -> RewardFunction:
        function = _stand_in if part.name in made else build_reward(part, key, config.device)
        return _stand_in if Path(part.name).is_dir() else function

    reward = build_rewards(settings.reward, checked)
    metric = None if settings.metric is None else checked(RewardPart(name=settings.metric), "task.metric")
    if settings.prompts in made:
        return None
    task = _task(settings, reward, metric)
    probe_functions(task)
    return task


def _stand_in(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward in place of a reward model that is not loaded."""
    return [0.0] * len(completions)


def probe_functions(task: TextTask) -> None:
    """Call reward and metric on two made-up completions: a broken one should fail now, not after a rollout.

    Raises InputError as `compute_rewards` does.
    """
    examples = (task.train * 2)[:2]
    trajectories = [
        Trajectory(
            example.prompt, [Turn((), text, by_policy=True)], StopReason.LENGTH, columns=example.columns
        )
        for example, text in zip(examples, ("A short completion.", ""), strict=True)
    ]
    generators = checkpoint.generator_states()
    assign_rewards(task.reward, trajectories)
    if task.metric is not None:
        compute_rewards(task.metric, trajectories, name="metric")
    checkpoint.restore_generators(generators)

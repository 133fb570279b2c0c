"""Config -> what a language model learns with: the policy, the task and its rewards, the data."""

import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from surefoot.build.preflight import SETTINGS, build_device, model_of_run
from surefoot.config import Config, CriticConfig, PolicyConfig, PTXConfig, SFTConfig, TaskConfig, load_config
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
from surefoot.train import checkpoint
from surefoot.types import StopReason, Trajectory, Turn

Rewarder = Callable[[str, str], RewardFunction]  # (what a key names, the key) -> the reward


def build_policy(config: Config) -> CausalLMPolicy:
    """The policy of a run, fetched if need be."""
    device = build_device(config.device)
    source = assets.resolve(config.policy.model)
    check_model_folder(source)
    if not os.path.exists(source):
        what = f"{source} is no folder here and no asset ({', '.join(assets.ASSETS)})"
        assets.log_to_stderr(f"{what}: asking the Hugging Face hub for it")
    critic = config.policy.critic if config.ppo.has_critic else CriticConfig()  # the default learns no values
    if critic.model is not None:
        model = model_of_run(assets.resolve(critic.model, key="policy.critic.model"))
        critic = critic.model_copy(update={"model": model})
    settings = config.policy.model_copy(update={"critic": critic})
    return load_policy(source, settings, device=device, seed=derived_seed(config.seed, "adapter", 0))


def check_critic(policy: Any, config: Config) -> None:
    """Raise InputError for a loaded policy without the critic asked for, or with one that is not trained."""
    critic = config.policy.critic
    has_values = config.supervised is None and config.ppo.has_critic
    if not has_values and getattr(policy, "critic", None) is not None:
        what = "it has a separate critic, which this run would not train"
        raise InputError(f"policy: {what}; load it with critic.kind: shared")
    if isinstance(policy, CausalLMPolicy) and (has_values or config.reward_model is not None):
        lacks_own = critic.kind != "shared" and policy.critic is None
        if lacks_own or (critic.stop_gradient and not policy.stop_gradient):
            how = "give load_policy the same PolicyConfig(critic=...)"
            raise InputError(f"policy: it was loaded without what policy.critic asks for; {how}")


def build_preferences(config: Config, data: Any = None) -> PreferenceDataset:
    """`data`, or what the run's section names. Raises InputError for what says nothing."""
    section = config.dpo or config.reward_model
    assert section is not None
    if (data := section.data if data is None else data) is None:
        how = "name a JSONL file of preferences, or give them in Python"
        raise InputError(f"{config.supervised}.data is missing: {how}")
    limits = getattr(section, "rating_range", None)
    preferences = PreferenceDataset(data, held_out=section.held_out, rating_range=limits)
    if config.dpo and not preferences.of_pairs:
        raise InputError("dpo.data: DPO learns from pairs, and these are ratings; train a reward model")
    if (settings := config.reward_model) is None:
        return preferences
    if preferences.of_pairs and settings.rating_range is not None:
        raise InputError("reward_model.rating_range is for ratings, and these are pairs; leave it out")
    if settings.center and not preferences.of_pairs:
        raise InputError("reward_model.center is for pairs, and these are ratings; leave it out")
    return preferences


def build_examples(config: Config, data: Any = None) -> Demonstrations | PreferenceDataset:
    """What a supervised run learns from: `data`, or what its section names. Raises InputError."""
    return build_preferences(config, data) if config.sft is None else build_demonstrations(config.sft, data)


def build_demonstrations(settings: SFTConfig | PTXConfig, data: Any = None) -> Demonstrations:
    """`data`, or what the section names. Raises InputError for what cannot be learned from."""
    is_sft = isinstance(settings, SFTConfig)
    key, given, name = ("sft.data", "data", "data") if is_sft else ("ptx.data", "ptx_data", "ptx.data")
    if data is None and settings.data is None:
        how = f"name a JSONL file of examples; what was given in Python ({given}), give again"
        raise InputError(f"{key} is missing: {how}")
    source = assets.resolve(str(settings.data), key=key) if data is None else data
    return Demonstrations(source, held_out=settings.held_out, columns=settings.columns, name=name)


def build_task(config: Config, build: Rewarder | None = None) -> TextTask:
    """The task of a run, its rewards built by `build`, by default `build_reward`.

    Rewards are found before prompts are fetched; reward models are loaded when they are first asked.
    """
    task = config.task
    assert task is not None
    reward, metric = _rewards(task, build or functools.partial(build_reward, device=config.device))
    fields = task.model_dump(include={"held_out", "prompt_column", "prompt_tokens", "chat"})
    return TextTask(assets.resolve(task.prompts, key="task.prompts"), reward, metric=metric, **fields)


def _rewards(task: TaskConfig, build: Rewarder) -> tuple[RewardFunction | MixedReward, RewardFunction | None]:
    """The reward, or the sum of its parts, and the metric; `build` makes each."""
    reward: RewardFunction | MixedReward
    if isinstance(task.reward, str):
        reward = build(task.reward, "task.reward")
    else:
        parts = {part.called: part for part in task.reward}
        built = {name: build(part.name, f"task.reward, {name}") for name, part in parts.items()}
        reward = MixedReward({name: (built[name], part.weight) for name, part in parts.items()})
    return reward, None if task.metric is None else build(task.metric, "task.metric")


def build_reward(name: str, key: str, device: str) -> RewardFunction:
    """The Python function, or the reward model's folder, of this name. Raises InputError naming `key`."""
    if not Path(name).is_dir():
        if not is_function(name):
            form = "expected 'file.py:function' or 'package.module:function'"
            raise InputError(f"{key}: {form}, got {name!r}; nor is it a reward model's folder")
        return load_function(name, key=key)
    folder = _reward_folder(name, key)
    # Loaded when it is first asked: what else is wrong with a run is found before.
    model = functools.cache(lambda: load_reward(folder, device=device, key=key))
    return lambda prompts, completions, **_: model().rewards(prompts, completions)


def load_reward(folder: str | Path, *, device: str = "auto", key: str = "reward model") -> RewardModelPolicy:
    """The reward model in `folder`, its run's or what `save` wrote. Raises InputError naming `key`."""
    folder = _reward_folder(folder, key)
    settings = PolicyConfig(adapter=None, dtype=load_config(folder / SETTINGS).policy.dtype)
    policy = RewardModelPolicy(load_policy(str(folder), settings, device=build_device(device)), seed=0)
    policy.load_head(folder)
    return policy


def _reward_folder(folder: str | Path, key: str) -> Path:
    """Where in `folder` the reward model is."""
    folder = Path(model_of_run(str(folder)))
    if not (folder / REWARD).is_file():
        what = f"no reward model in {folder}, which would have a {REWARD}"
        raise InputError(f"{key}: {what}; train it to its end, or save it")
    return folder


def check_sources(config: Config, *, made: Collection[str]) -> TextTask | None:
    """Read what a run learns from, but for paths that will be `made`; the task, if its prompts are there.

    Raises InputError for what cannot be learned from, and rewards that fail; reward models have stand-ins.
    """
    for section in (config.sft, config.ptx):
        if section is not None and section.data not in made:
            build_demonstrations(section)
    for of_preferences in (config.reward_model, config.dpo):
        if of_preferences is not None and of_preferences.data not in made:
            build_preferences(config)
    if config.task is None:
        return None

    def checked(name: str, key: str) -> RewardFunction:
        function = _stand_in if name in made else build_reward(name, key, config.device)
        return _stand_in if Path(name).is_dir() else function

    if config.task.prompts in made:
        _rewards(config.task, checked)
        return None
    task = build_task(config, build=checked)
    probe_functions(task)
    return task


def _stand_in(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward in place of a reward model that is not loaded."""
    return [0.0] * len(completions)


def probe_functions(task: TextTask) -> None:
    """Call reward and metric on two made-up completions: a broken one fails now, not after a rollout."""
    trajectories = [
        Trajectory(one.prompt, [Turn((), text, by_policy=True)], StopReason.LENGTH, columns=one.columns)
        for one, text in zip((task.train * 2)[:2], ("A short completion.", ""), strict=True)
    ]
    generators = checkpoint.generator_states()
    assign_rewards(task.reward, trajectories)
    if task.metric is not None:
        compute_rewards(task.metric, trajectories, name="metric")
    checkpoint.restore_generators(generators)

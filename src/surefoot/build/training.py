"""Config -> objects. With `build_text` the only file that knows every class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surefoot.config import (
    Config,
    CriticConfig,
    EnvConfig,
    PTXConfig,
    SelfPlayConfig,
    SFTConfig,
)
from surefoot.core.seeds import derived_seed
from surefoot.data import assets
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.preferences import PreferenceDataset
from surefoot.envs.games import GameVectorEnv, make_games
from surefoot.envs.gym import Vector, make_vector, wrap_vector
from surefoot.envs.record import Frame, recorded_vector
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.base import ActingPolicy, Policy
from surefoot.policies.control.policy import ControlPolicy
from surefoot.policies.lm.policy import CausalLMPolicy, load_policy, resolve_dtype
from surefoot.policies.lm.pretrained import check_model_folder
from surefoot.policies.lm.reward_model import RewardModelPolicy
from surefoot.rewards.functions import is_function, load_function
from surefoot.rollout.base import Rollout
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.rollout.gym import GymRollout
from surefoot.rollout.mixed import MixedRollout
from surefoot.rollout.opponents import OpponentPool
from surefoot.rollout.preferences import PreferenceRollout, shares_of_heads
from surefoot.rollout.text import TextRollout
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint, loop
from surefoot.train.update import make_optimizer

# Written beside the weights by `save`, so that `load` gives back critic and settings too.
SETTINGS = "surefoot.yaml"
# What a run learns in, or from.
Environment = TextTask | Vector | Demonstrations | PreferenceDataset


def build_device(name: str) -> str:
    """The device `config.device` means here. Raises InputError for one this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise InputError(f"device: {name} is not available here; use device: auto or cpu")
    return name


def preflight(config: Config) -> None:
    """What a new run can be refused for before anything is fetched or loaded: run name, device, model folder."""
    RunFolder.check_free(config)
    build_device(config.device)
    if config.env is None and config.policy.model not in assets.ASSETS:
        check_model_folder(config.policy.model)
        if (critic := config.policy.critic.model) is not None and critic not in assets.ASSETS:
            check_model_folder(model_of_run(critic), key="policy.critic.model")


def build_policy(config: Config, *, say: Callable[[str], None] = assets.tell) -> CausalLMPolicy:
    """The policy of a run, fetched if need be."""
    device = build_device(config.device)
    source = assets.resolve(config.policy.model, say=say)
    check_model_folder(source)
    if not os.path.exists(source):
        say(
            f"{source} is no folder here and no asset ({', '.join(assets.ASSETS)}): asking the Hugging Face hub for it"
        )
    return load_policy(
        source,
        config.policy.model_copy(update={"critic": _critic(config, say)}),
        device=device,
        temperature=config.generation.temperature,
        seed=derived_seed(config.seed, "adapter", 0),
    )


def _critic(config: Config, say: Callable[[str], None]) -> CriticConfig:
    """The critic that is built: none of its own where no values are learned, and its model as a folder."""
    critic = config.policy.critic
    if not config.ppo.has_critic:
        return CriticConfig()
    if critic.model is None:
        return critic
    source = model_of_run(assets.resolve(critic.model, key="policy.critic.model", say=say))
    return critic.model_copy(update={"model": source})


def model_of_run(folder: str) -> str:
    """The model's folder in a run folder, or `folder` itself."""
    return str(Path(folder) / "model") if (Path(folder) / "config.yaml").is_file() else folder


def build_reward_policy(config: Config, trunk: CausalLMPolicy) -> RewardModelPolicy:
    """A reward model over a language model, which it takes over."""
    _check_no_critic(trunk)
    _check_critic(trunk, config.policy.critic)
    assert config.reward_model is not None
    return RewardModelPolicy(
        trunk, seed=derived_seed(config.seed, "reward head", 0), heads=config.reward_model.heads
    )


def build_preferences(config: Config, data: Any = None) -> PreferenceDataset:
    """The preferences of a run: `data`, or what `reward_model.data` names. Raises InputError for what says nothing."""
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
    if settings.heads > 1:  # a head without any is refused here, before a model is loaded
        shares_of_heads(len(preferences.train), heads=settings.heads, seed=config.seed)
    return preferences


def build_demonstrations(
    settings: SFTConfig | PTXConfig, data: Any = None, *, say: Callable[[str], None] = assets.tell
) -> Demonstrations:
    """The examples of a run: `data`, or what the section names. Raises InputError for what cannot be learned from."""
    is_sft = isinstance(settings, SFTConfig)
    key, given = ("sft.data", "data") if is_sft else ("ppo.ptx.data", "ptx_data")
    if data is None:
        if settings.data is None:
            raise InputError(
                f"{key} is missing: name a JSONL file of examples; what was given in Python ({given}), give again"
            )
        data = assets.resolve(settings.data, key=key, say=say)
    return Demonstrations(
        data, held_out=settings.held_out, columns=settings.columns, name="data" if is_sft else key
    )


def build_vector(config: Config, env: Any = None, *, for_evaluation: bool = False) -> Vector:
    """The environment of a run: what the user made, or copies of what `env.id` names."""
    assert config.env is not None
    settings = config.env
    seed = derived_seed(config.seed, "evaluation" if for_evaluation else "environment", 0)
    if env is not None and not isinstance(env, str):
        vector = wrap_vector(env, seed=seed)
        if settings.n_envs not in (1, vector.num_envs):
            raise InputError(
                f"n_envs: the environment given has {vector.num_envs}, not {settings.n_envs}; give an id, or a Gymnasium "
                "vector environment of so many copies"
            )
        return vector
    if settings.id is None:
        raise InputError("the environment was made in Python; give it again: PPO.load(folder, env)")
    kwargs = settings.kwargs | (settings.eval_kwargs if for_evaluation else {})
    make = _maker(settings.id)
    if _has_two_players(settings):
        if settings.vectorization != "sync":
            raise InputError(
                "env.vectorization: two-player games are stepped in one process, for one opponent; leave it out"
            )
        return make_games(make, n_envs=settings.n_envs, kwargs=kwargs, seed=seed)
    vectorization = "sync" if for_evaluation and settings.vectorization == "async" else settings.vectorization
    return make_vector(make, n_envs=settings.n_envs, vectorization=vectorization, kwargs=kwargs, seed=seed)


def build_recorded(config: Config, show: Callable[[Frame, float], None]) -> Vector:
    """One copy of what a run is evaluated in, begun from the same seeds; `show` gets its first episode's frames."""
    assert config.env is not None and config.env.id is not None
    kwargs = config.env.kwargs | config.env.eval_kwargs
    seed = derived_seed(config.seed, "evaluation", 0)
    return recorded_vector(_maker(config.env.id), kwargs=kwargs, seed=seed, show=show)


def _has_two_players(env: EnvConfig) -> bool:
    return env.self_play is not None or (env.id or "").startswith("classic/")


def _maker(name: str) -> Any:
    return load_function(name, key="env.id") if is_function(name) else name


def build_control_policy(config: Config, env: Vector, module: nn.Module | None = None) -> Any:
    """A network for the environment's spaces. `module` is the user's: a whole policy (`ActingPolicy`), or what extracts
    features.
    """
    assert config.env is not None
    device = build_device(config.device)
    if module is not None and hasattr(module, "act"):
        asked = {
            name
            for kind in (Policy, ActingPolicy)
            for name in (*vars(kind), *kind.__annotations__)
            if name[0] != "_"
        }
        if missing := sorted(name for name in asked if not hasattr(module, name)):
            raise InputError(f"policy: yours has act, but lacks {', '.join(missing)} (docs/extending.md)")
        return module.to(device)
    # Only convolutions are large enough to gain from half precision.
    wanted = (
        config.policy.dtype if "Cnn" in config.policy.model or config.policy.dtype != "auto" else "float32"
    )
    policy = ControlPolicy(
        env.observation_spaces,
        env.action_space,
        extractor=module,
        config=config.policy.network,
        kind=config.policy.model,
        normalize=config.env.normalize_observations,
        dtype=resolve_dtype(wanted, device),
        seed=derived_seed(config.seed, "network", 0),
    )
    return policy.to(device)


def build_rollout(
    config: Config, policy: Any, env: Environment, demonstrations: Demonstrations | None = None
) -> Rollout:
    """What collects the batches of a run; `demonstrations` are those of `ppo.ptx`."""
    if config.supervised or not config.ppo.has_critic:
        _check_no_critic(policy)
    else:
        _check_critic(policy, config.policy.critic)
    if isinstance(env, Demonstrations):
        assert config.sft is not None
        return DemonstrationRollout(policy, env, sft=config.sft, seed=config.seed)
    if isinstance(env, PreferenceDataset):
        assert config.reward_model is not None
        return PreferenceRollout(policy, env, settings=config.reward_model, seed=config.seed)
    if isinstance(env, TextTask):
        rollout = TextRollout(policy, env, generation=config.generation, ppo=config.ppo, seed=config.seed)
        return rollout if demonstrations is None else _mixed(config, rollout, demonstrations)
    assert config.env is not None
    make = None if config.env.id is None else lambda: build_vector(config, for_evaluation=True)
    league = None
    if _has_two_players(config.env):
        if not isinstance(env.env, GameVectorEnv):
            raise InputError("env.self_play needs a two-player game: a GameVectorEnv, or the env.id of one")
        league = OpponentPool(policy, env.env, config.env.self_play or SelfPlayConfig())
    return GymRollout(
        policy,
        env,
        settings=config.env,
        ppo=config.ppo,
        seed=config.seed,
        make_evaluation=make,
        league=league,
    )


def _mixed(config: Config, rollout: TextRollout, demonstrations: Demonstrations) -> MixedRollout:
    ptx = config.ppo.ptx
    assert ptx is not None
    sft = SFTConfig(
        batch_size=ptx.batch_size, max_tokens=ptx.max_tokens, micro_batch_tokens=config.ppo.micro_batch_tokens
    )
    # A seed of their own: a list as long as the prompts would be in the prompts' order.
    seed = derived_seed(config.seed, "ptx", 0)
    return MixedRollout(
        rollout, DemonstrationRollout(rollout.policy, demonstrations, sft=sft, seed=seed, key="ppo.ptx")
    )


def _check_critic(policy: Any, critic: CriticConfig) -> None:
    """Raise InputError for a loaded policy that lacks what `policy.critic` asks for."""
    if isinstance(policy, CausalLMPolicy):
        lacks_own = critic.kind != "shared" and policy.critic is None
        if lacks_own or (critic.stop_gradient and not policy.stop_gradient):
            raise InputError(
                "policy: it was loaded without what policy.critic asks for; give load_policy the same PolicyConfig(critic=...)"
            )


def _check_no_critic(policy: Any) -> None:
    """Raise InputError for a loaded policy that brings a critic's weights along to where no values are learned."""
    if getattr(policy, "critic", None) is not None:
        raise InputError(
            "policy: it has a critic of its own, which this run would not train; load it with critic.kind: shared"
        )


def build_training(
    config: Config,
    policy: Any,
    env: Environment,
    folder: RunFolder | None = None,
    *,
    demonstrations: Demonstrations | None = None,
) -> loop.Training:
    """A run at its beginning, in a new folder where none is given, or at the newest whole checkpoint of its folder."""
    rollout = build_rollout(config, policy, env, demonstrations)
    folder = folder or RunFolder.create(
        config
    )  # after the prompts were found to fit: a refused run leaves nothing
    training = loop.Training(
        config=config,
        policy=policy,
        rollout=rollout,
        optimizer=make_optimizer(
            policy, config.algorithm, critic_learning_rate=config.policy.critic.learning_rate
        ),
        folder=folder,
        progress=loop.Progress(kl_coef=config.ppo.kl_coef),
        total=_budget(config, env),
    )
    newest = checkpoint.newest_checkpoint(folder.checkpoints)
    if newest is not None:
        loop.restore(training, newest)
    else:
        folder.cut_logs({})
    return training


def _budget(config: Config, env: Environment) -> int:
    """Units of the run: examples, episodes or timesteps."""
    if isinstance(env, (Demonstrations, PreferenceDataset)):
        settings = config.sft or config.reward_model
        assert settings is not None
        return settings.epochs * len(env.train)
    return config.ppo.total_episodes if isinstance(env, TextTask) else config.ppo.total_timesteps


def restore_best(policy: Any, folder: RunFolder) -> Path:
    """Load the run's best weights (by the held-out metric), else its newest; the checkpoint they came from.

    Raises InputError if the run has none yet: what is untrained must not pass for its own.
    """
    path = checkpoint.pointed_checkpoint(folder.checkpoints, "best") or checkpoint.newest_checkpoint(
        folder.checkpoints
    )
    if path is None:
        raise InputError(f"{folder.path} has no checkpoint yet; wait for its first one")
    tensors, state = checkpoint.load_checkpoint(path)
    checkpoint.restore_policy(policy, tensors["policy"])
    if isinstance(policy, ControlPolicy):
        policy.restore(state["rollout"]["policy"])
    return path

"""Config -> a training: what collects its batches, its optimizer, its run folder, its checkpoint."""

from typing import Any

from surefoot.build.control import build_vector, has_two_players
from surefoot.build.inputs import code_inputs
from surefoot.build.language import check_critic
from surefoot.config import Config, SelfPlayConfig, SFTConfig
from surefoot.core.running import RunningStats
from surefoot.core.seeds import derived_seed
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.preferences import PreferenceDataset
from surefoot.envs.games import GameVectorEnv
from surefoot.envs.gym import Vector
from surefoot.envs.text import TextTask
from surefoot.errors import InputError
from surefoot.policies.control import fast_mlp
from surefoot.policies.control.policy import ControlPolicy
from surefoot.rollout.base import Rollout
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.rollout.gym import GymRollout
from surefoot.rollout.opponents import OpponentPool
from surefoot.rollout.pairs import PairRollout
from surefoot.rollout.preferences import PreferenceRollout
from surefoot.rollout.text import TextRollout
from surefoot.storage.run_folder import RunFolder
from surefoot.train import checkpoint, loop, supervised_objectives
from surefoot.train.objective import Objective
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.update import make_optimizer

# What a run learns from, or in.
Examples = Demonstrations | PreferenceDataset
Environment = TextTask | Vector | Examples
Parts = tuple[Rollout, Objective]
SMALL = 100_000  # parameters of a network whose operations are over before a second thread has begun


def build_rollout(config: Config, policy: Any, env: Environment) -> Rollout:
    """What collects the batches of a run."""
    check_critic(policy, config)
    if config.sft is not None and isinstance(env, Demonstrations):
        return DemonstrationRollout(policy, env, sft=config.sft, seed=config.seed)
    if config.reward_model is not None and isinstance(env, PreferenceDataset):
        return PreferenceRollout(policy, env, config.reward_model, config.seed)
    if config.dpo is not None and isinstance(env, PreferenceDataset):
        return PairRollout(policy, env, config.dpo, config.seed)
    if isinstance(env, TextTask):
        return TextRollout(policy, env, config=config, seed=config.seed)
    gym, ppo, seed = config.env, config.ppo, config.seed
    assert gym is not None and isinstance(env, Vector)
    make = None if gym.id is None else lambda: build_vector(config, for_evaluation=True)
    pool = None
    if has_two_players(gym):
        if not isinstance(env.env, GameVectorEnv):
            raise InputError("env.self_play needs a two-player game: a GameVectorEnv, or the env.id of one")
        pool = OpponentPool(policy, env.env, gym.self_play or SelfPlayConfig())
    return GymRollout(policy, env, settings=gym, ppo=ppo, seed=seed, make_evaluation=make, opponents=pool)


def build_objective(config: Config, policy: Any, rollout: Rollout, ptx_data: Any = None) -> Objective:
    """What a run lowers; `ptx_data` are the `Demonstrations` of `ptx`."""
    if isinstance(rollout, DemonstrationRollout):
        return supervised_objectives.NLLObjective(config.sft)
    if isinstance(rollout, PreferenceRollout):
        return supervised_objectives.PreferenceObjective(rollout.loss, config.reward_model)
    if isinstance(rollout, PairRollout):
        return supervised_objectives.DPOObjective(rollout.loss, config.dpo)
    if ptx_data is None or (ptx := config.ptx) is None:
        is_adam = config.ppo.optimizer == "adam"
        return PPOObjective(config, accelerator=fast_mlp.accelerator(policy) if is_adam else None)
    micro, temperature = config.ppo.micro_batch_tokens, config.generation.temperature
    shared = {name: getattr(ptx, name) for name in ("batch_size", "max_tokens", "mask_history")}
    sft = SFTConfig(micro_batch_tokens=micro, **shared)
    seed = derived_seed(config.seed, "ptx", 0)  # or a list as long as the prompts would be in their order
    rows = DemonstrationRollout(policy, ptx_data, sft=sft, seed=seed, key="ptx", temperature=temperature)
    return supervised_objectives.SumObjective(config, rows)


def total_of(config: Config, env: Any) -> int:
    """How many episodes, timesteps or examples the configuration asks for."""
    if isinstance(env, Examples) and (settings := config.examples) is not None:
        return settings.epochs * len(env.train)
    return config.rollout.total_episodes if config.env is None else config.env.total_timesteps


def build_training(
    config: Config,
    policy: Any,
    env: Any,
    parts: Parts,
    folder: RunFolder | None = None,
    *,
    accept: bool = False,
) -> loop.Training:
    """A run at its beginning, in a new folder, or at the newest whole checkpoint of `folder`.

    Raises InputError where its inputs are not what they were, unless `accept`.
    """
    folder = folder or RunFolder.create(config)
    rollout, objective = parts
    optimizer = make_optimizer(policy, objective, critic_learning_rate=config.policy.critic.learning_rate)
    training = loop.Training(config, policy, rollout, objective, optimizer, folder, total_of(config, env))
    training.inputs = {**rollout.inputs, **objective.inputs, **code_inputs(config)}
    training.inputs["policy.model"] = str(policy.fingerprint())
    if config.env is not None and sum(p.numel() for p in policy.parameters()) < SMALL:
        training.threads = 1
    if (newest := checkpoint.newest_checkpoint(folder.checkpoints)) is not None:
        loop.restore(training, newest, accept_changes=accept)
    else:
        folder.cut_logs({})
    return training


def restore_best(policy: Any, folder: RunFolder, env: Any) -> None:
    """Load the run's best weights (by the held-out metric), else its newest. Raises InputError without."""
    best = checkpoint.pointed_checkpoint(folder.checkpoints, "best")
    if (path := best or checkpoint.newest_checkpoint(folder.checkpoints)) is None:
        # What is untrained must not pass for the run's own.
        raise InputError(f"{folder.path} has no checkpoint yet; wait for its first one")
    tensors, state = checkpoint.load_checkpoint(path)
    model = {"policy.model": str(policy.fingerprint())}
    checkpoint.check_inputs(folder.path, state["inputs"], state["inputs"] | model, accept=False)
    checkpoint.restore_policy(policy, tensors["policy"])
    if isinstance(policy, ControlPolicy):
        policy.restore(state["rollout"]["policy"])
    if isinstance(env, Vector):
        env.reward_stats = RunningStats(**state["rollout"]["reward_stats"])

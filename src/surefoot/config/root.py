"""The whole configuration of a run: `run`, `evaluate`, all sections together, and which settings clash."""

import math
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from surefoot.config.env import EnvConfig
from surefoot.config.fields import FolderPath, Positive, Section, setting
from surefoot.config.kinds import KINDS, SUPERVISED, foreign_sections, kind_of, with_defaults
from surefoot.config.messages import short
from surefoot.config.policy import NETWORKS, CriticConfig, PolicyConfig
from surefoot.config.ppo import GroupConfig, KLConfig, PPOConfig, ShapingConfig
from surefoot.config.rollout import GenerationConfig, RejectionSamplingConfig, RolloutConfig
from surefoot.config.supervised import DPOConfig, NewModelConfig, PTXConfig, RewardModelConfig, SFTConfig
from surefoot.config.task import TaskConfig

# Advantages that compare the completions of one prompt with each other.
GROUPED = ("grpo", "dr_grpo", "rloo")
# Settings of `ppo` that environments do without.
OF_TEXT = ("advantage", "loss_aggregation", "policy_loss", "importance_sampling_level", "mask_truncated")


class RunConfig(Section):
    """Where the run writes its files."""

    name: str | None = setting(None, "Name of the run's folder; `null`: `ppo-1`, or the next that is free.")
    folder: FolderPath = setting("runs", "Folder that holds run folders.")
    checkpoint_every: Positive = setting(10, "Updates between checkpoints; with `env` 25,600 steps, ≤ 100.")
    trackers: list[Literal["wandb", "trackio", "mlflow"]] = setting([], "Where else metrics are logged.")
    keep_checkpoints: int = setting(2, "Latest checkpoints kept, in addition to the best one.", ge=2)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is None:
            return None
        is_plain = name.isprintable() and ".." not in name and not set(name) & set("/\\")
        if not is_plain or name in {"", "."} or len(name.encode()) > 200:
            raise ValueError(f"{short(name)} is not a plain folder name; no slashes or '..', ≤ 200 bytes")
        return name


class EvaluateConfig(Section):
    """Evaluation on held-out prompts or examples, or in a separate environment."""

    every: Positive | None = setting(10, "Updates between evaluations; `null`: only at start and end.")
    episodes: int = setting(64, "Held-out rows, or episodes of `env`, in each evaluation; 0: none.", ge=0)


class Config(Section):
    """Everything a run needs."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(0, "Decides all randomness; None in Python: drawn.")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "`auto`: cuda, else mps, else cpu.")
    run: RunConfig = RunConfig()
    policy: PolicyConfig = PolicyConfig()
    task: TaskConfig | None = None
    env: EnvConfig | None = None
    sft: SFTConfig | None = None
    new_model: NewModelConfig | None = None
    reward_model: RewardModelConfig | None = None
    dpo: DPOConfig | None = None
    rejection_sampling: RejectionSamplingConfig | None = None
    generation: GenerationConfig = GenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    group: GroupConfig = GroupConfig()
    shaping: ShapingConfig = ShapingConfig()
    ptx: PTXConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("seed", mode="before")
    @classmethod
    def _drawn(cls, seed: Any) -> Any:
        return secrets.randbelow(2**31) if seed is None else seed

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, data: Any) -> Any:
        return with_defaults(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if problem := next(_contradictions(self), None):
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _own_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = foreign_sections(self.kind)
        return {name: value for name, value in dump(self).items() if name not in foreign}

    @property
    def kind(self) -> str:
        """The section that says what kind of run this is; `task` also where the task is given in Python."""
        return kind_of([name for name in KINDS if getattr(self, name) is not None])

    @property
    def supervised(self) -> str | None:
        """Name of the section that makes this a supervised run."""
        return self.kind if self.kind in SUPERVISED else None

    @property
    def examples(self) -> SFTConfig | RewardModelConfig | DPOConfig | None:
        """The section that makes this a supervised run."""
        return self.sft or self.reward_model or self.dpo

    @property
    def opener(self) -> str:
        """Name of the class that a run of this kind is opened with."""
        return "RejectionSampling" if self.rejection_sampling else SUPERVISED.get(self.kind, "PPO")

    @property
    def verb(self) -> str:
        """The command that starts a run of this kind."""
        if self.rejection_sampling is not None:
            return "rejection-sampling"
        return (self.supervised or "ppo").replace("_", "-")


# --- settings that contradict each other, and how to fix them: a line each ---


def _contradictions(config: Config) -> Iterator[str]:
    if config.ppo.clip_range_high is not None and config.ppo.clip_schedule != "constant":
        yield "ppo.clip_schedule moves ppo.clip_range alone; leave ppo.clip_range_high out"
    if config.supervised is None:
        yield from _in_text_run(config) if config.env is None else _in_environment(config, config.env)
    elif config.policy.critic.model_copy(update={"stop_gradient": False}) != CriticConfig():
        yield f"policy.critic: a run of {config.supervised} has no critic; leave the section out"


def _in_text_run(config: Config) -> Iterator[str]:
    kl, rejection, size = config.kl, config.rejection_sampling, config.group.size
    least = 0.2 * config.rollout.episodes_per_update
    if kl.target is not None and kl.coef == 0:
        yield "kl.target adapts kl.coef, and 0 would stay 0; give kl.coef a positive start"
    if kl.target is not None and least >= kl.horizon:
        # An update changes kl.coef by up to 20 % × episodes / horizon.
        yield f"kl.horizon ({kl.horizon:g}) could take kl.coef below 0; give more than {least:g}"
    yield from _in_advantage(config)
    yield from _in_rollout(config)
    if rejection is not None and config.task is None:
        yield "rejection_sampling completes the prompts of a task; give it a task section"
    if rejection is not None and rejection.episodes % size:
        yield f"group.size ({size}) does not divide rejection_sampling.episodes ({rejection.episodes})"


def _in_advantage(config: Config) -> Iterator[str]:
    """What the advantage needs and is not there, or has no use for."""
    ppo, group, critic = config.ppo, config.group, config.policy.critic
    kind = ppo.advantage
    if ppo.policy_loss == "cispo" and ppo.dual_clip is not None:
        yield "ppo.dual_clip bounds the clipped loss; leave it out with ppo.policy_loss: cispo"
    if kind in GROUPED and group.size == 1:
        yield f"ppo.advantage: {kind} compares completions of a prompt; give group.size 2 or more"
    if group.skip_zero_variance and kind not in GROUPED:
        yield f"group.skip_zero_variance is for ppo.advantage: {', '.join(GROUPED)}, not {kind}"
    if critic.warmup_updates and critic.kind == "shared" and not critic.stop_gradient:
        why = "its loss would move the shared trunk; set policy.critic.stop_gradient: true"
        yield f"policy.critic.warmup_updates trains the critic alone, but {why} or another policy.critic.kind"
    needs_critic = {
        "ppo.clip_range_vf": ppo.clip_range_vf is not None,
        "shaping.whiten": config.shaping.whiten,
        "policy.critic.gae_lambda": critic.gae_lambda is not None,
        "policy.critic.warmup_updates": critic.warmup_updates > 0,
    }
    if not ppo.has_critic:
        for name in (name for name, is_used in needs_critic.items() if is_used):
            yield f"{name} is for ppo.advantage: gae; {kind} has no critic"
        if ppo.gamma != 1 and kind != "reinforce_pp":
            yield f"ppo.gamma: with {kind} the tokens of a completion share its reward; leave it out"


def _in_rollout(config: Config) -> Iterator[str]:
    """Sizes that do not divide an update, and sampling that cannot be trained on."""
    whole, generation = config.rollout.episodes_per_update, config.generation
    batch_size = 1 if config.rejection_sampling else config.ppo.batch_size  # it updates nothing
    for key, size in {"ppo.batch_size": batch_size, "group.size": config.group.size}.items():
        if whole % size:
            near, of = _nearest_divisor(whole, size), f"rollout.episodes_per_update ({whole})"
            yield f"{key} ({size}) does not divide {of}; try {near}"
    for name in ("top_k", "top_p"):
        if getattr(generation, name) is not None:
            yield f"generation.{name}: training needs the full vocabulary; leave it out"
    if generation.temperature == 0:
        yield "generation.temperature: training needs more than 0 (greedy); leave it out"


def _nearest_divisor(whole: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))


def _in_environment(config: Config, env: EnvConfig) -> Iterator[str]:
    ppo, model = config.ppo, config.policy.model
    if config.evaluate.every is not None and not config.evaluate.episodes:
        yield "evaluate.every: no episodes to evaluate on; give evaluate.episodes too"
    for name in OF_TEXT:
        if getattr(ppo, name) != PPOConfig.model_fields[name].default:
            yield f"ppo.{name} is for text tasks; leave it out"
    if config.policy.critic.model_copy(update={"gae_lambda": None}) != CriticConfig():
        yield "policy.critic is for text tasks; with env use policy.network.share"
    if model not in NETWORKS:
        yield f"policy.model: {short(model)}; with env it is one of {', '.join(NETWORKS)}"
    if "Lstm" in model and ppo.batch_size % env.n_steps:
        near = env.n_steps * max(1, round(ppo.batch_size / env.n_steps))
        wrong = f"ppo.batch_size ({ppo.batch_size}) is not a multiple of env.n_steps ({env.n_steps})"
        yield f"{wrong}: recurrent policies are trained on whole sequences; try {near}"

"""The whole configuration of a run: the sections `run` and `evaluate`, and all sections together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from surefoot.config import checks
from surefoot.config.env import EnvConfig
from surefoot.config.fields import FolderPath, Positive, Section, setting
from surefoot.config.kinds import KINDS, check_sections, foreign_sections, kind_of, with_defaults
from surefoot.config.messages import short
from surefoot.config.policy import PolicyConfig
from surefoot.config.ppo import GroupConfig, KLConfig, PPOConfig, ShapingConfig
from surefoot.config.rollout import GenerationConfig, RejectionSamplingConfig, RolloutConfig
from surefoot.config.supervised import NewModelConfig, PTXConfig, RewardModelConfig, SFTConfig
from surefoot.config.task import TaskConfig


class RunConfig(Section):
    """Where the run writes its files."""

    name: str | None = setting(None, "Name of the run's folder; `null`: `ppo-1`, or the next that is free.")
    folder: FolderPath = setting("runs", "Folder that holds run folders.")
    checkpoint_every: Positive = setting(10, "Updates between checkpoints; with `env` 25,600 steps, ≤ 100.")
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

    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(0, "All random numbers of the run follow from it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "`auto`: cuda, else mps, else cpu.")
    run: RunConfig = RunConfig()
    policy: PolicyConfig = PolicyConfig()
    task: TaskConfig | None = None
    env: EnvConfig | None = None
    sft: SFTConfig | None = None
    new_model: NewModelConfig | None = None
    reward_model: RewardModelConfig | None = None
    rejection_sampling: RejectionSamplingConfig | None = None
    generation: GenerationConfig = GenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    group: GroupConfig = GroupConfig()
    shaping: ShapingConfig = ShapingConfig()
    ptx: PTXConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        check_sections([name for name in cls.model_fields if data.get(name) is not None])
        return with_defaults(data)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        critic = self.policy.critic
        checks.check_clip(self.ppo)
        if self.supervised is not None:
            checks.check_supervised(self.supervised, critic)
        elif self.env is not None:
            checks.check_environment(self.env, self.ppo, self.policy)
        else:
            checks.check_kl(self.kl, self.rollout)
            checks.check_advantage(self.ppo, self.group, self.shaping, critic)
            batch_size = 1 if self.rejection_sampling else self.ppo.batch_size  # it updates nothing
            checks.check_rollout(self.rollout, self.group, self.generation, batch_size)
            if self.rejection_sampling is not None:
                checks.check_rejection(self.rejection_sampling, self.group, has_task=self.task is not None)
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
    def supervised(self) -> Literal["sft", "reward_model"] | None:
        """The section that makes this a supervised run."""
        return "sft" if self.sft is not None else "reward_model" if self.reward_model is not None else None

    @property
    def opener(self) -> str:
        """Name of the class that a run of this kind is opened with."""
        return {"ppo": "PPO", "sft": "SFT", "reward-model": "RewardModel"}.get(self.verb, "RejectionSampling")

    @property
    def verb(self) -> str:
        """The command that starts a run of this kind."""
        if self.rejection_sampling is not None:
            return "rejection-sampling"
        return (self.supervised or "ppo").replace("_", "-")

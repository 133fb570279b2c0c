"""The whole configuration of a run: its sections together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from surefoot.config import checks
from surefoot.config.env import EnvConfig
from surefoot.config.fields import Section, setting
from surefoot.config.kinds import KINDS, check_sections, foreign_sections, kind_of, with_defaults
from surefoot.config.policy import PolicyConfig
from surefoot.config.ppo import KLConfig, PPOConfig
from surefoot.config.rollout import (
    GenerationConfig,
    GroupConfig,
    RejectionSamplingConfig,
    RolloutConfig,
    ShapingConfig,
)
from surefoot.config.run import EvaluateConfig, RunConfig
from surefoot.config.supervised import NewModelConfig, PTXConfig, RewardModelConfig, SFTConfig
from surefoot.config.task import TaskConfig


def _section(model: type[Section]) -> Any:
    return Field(default_factory=model, description=model.__doc__)


def _optional(model: type[Section]) -> Any:
    return Field(None, description=model.__doc__)


class Config(Section):
    """Everything a run needs."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(0, "All random numbers of the run follow from it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "`auto`: cuda, else mps, else cpu.")
    run: RunConfig = _section(RunConfig)
    policy: PolicyConfig = _section(PolicyConfig)
    task: TaskConfig | None = _optional(TaskConfig)
    env: EnvConfig | None = _optional(EnvConfig)
    sft: SFTConfig | None = _optional(SFTConfig)
    new_model: NewModelConfig | None = _optional(NewModelConfig)
    reward_model: RewardModelConfig | None = _optional(RewardModelConfig)
    rejection_sampling: RejectionSamplingConfig | None = _optional(RejectionSamplingConfig)
    generation: GenerationConfig = _section(GenerationConfig)
    rollout: RolloutConfig = _section(RolloutConfig)
    ppo: PPOConfig = _section(PPOConfig)
    kl: KLConfig = _section(KLConfig)
    group: GroupConfig = _section(GroupConfig)
    shaping: ShapingConfig = _section(ShapingConfig)
    ptx: PTXConfig | None = _optional(PTXConfig)
    evaluate: EvaluateConfig = _section(EvaluateConfig)

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
            checks.check_rollout(self.rollout, self.group, self.generation, self.ppo)
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

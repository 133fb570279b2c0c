"""The sections of the configuration: one strict model each. Every field's description is its documentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from surefoot.config.fields import (
    AdamEpsilon,
    ExamplesColumns,
    ExamplesFile,
    ExamplesMaxTokens,
    Fraction,
    HeldOut,
    LearningRateWarmup,
    MaxBadSteps,
    MaxGradNorm,
    MicroBatchTokens,
    NonNegative,
    PathText,
    Positive,
    Schedule,
)
from surefoot.config.messages import short


class Section(BaseModel):
    """A strict part of the configuration: unknown keys are errors, values are not coerced, instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where the run leaves what it makes."""

    name: str | None = Field(
        None,
        description="Name of the run's folder; default: `ppo-1`, `ppo-2`, … (or `sft-1`, …), the first free one.",
    )
    folder: PathText = Field(
        "runs", description="Folder that holds run folders; the default is in the working directory."
    )
    checkpoint_every: Positive = Field(
        10,
        description="Updates between two checkpoints; with `sft` by default 25; with `env` about 25,600 timesteps, 100 updates at most.",
    )
    keep_checkpoints: int = Field(
        2, ge=2, description="How many of the newest checkpoints stay (the best one stays besides)."
    )

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and (
            not name.isprintable()
            or ".." in name
            or name in {"", "."}
            or set(name) & set("/\\")
            or len(name.encode()) > 200
        ):
            raise ValueError(
                f"{short(name)} is not a plain folder name; leave out slashes and '..', at most 200 bytes"
            )
        return name


class AdapterConfig(Section):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685). The reference model is the same weights with it switched off."""

    rank: Positive = Field(16, description="Rank of the adapter.")
    alpha: float = Field(32.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / rank.")
    targets: str | list[str] = Field(
        "all-linear", description="List of module names to adapt, or `all-linear`."
    )

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or (isinstance(targets, str) and targets != "all-linear"):
            raise ValueError(
                f"write all-linear or a list of module names such as [q_proj, v_proj], not {short(targets)}"
            )
        return targets


class CriticConfig(Section):
    """The value function."""

    kind: Literal["shared", "adapter", "separate"] = Field(
        "shared",
        description="`shared`: a linear fp32 head on the policy's last hidden state, zero at the start; `adapter`: such a head on a LoRA adapter of its own, over the policy's frozen base; `separate`: on a transformer of its own, all of whose weights are trained.",
    )
    stop_gradient: bool = Field(
        False,
        description="`shared`: keep the value loss's gradient out of the shared trunk; with `reward_model` the head alone learns, and the model under it stays as it was.",
    )
    model: PathText | None = Field(
        None,
        description="`separate`: the model it starts as, named as `policy.model` is, with the policy's tokenizer, or a reward model's folder, whose head it starts with too; `null`: a copy of the policy's base.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="`adapter` and `separate`: the critic's own step size at its highest, moved as `ppo.lr_schedule` says; `null`: `ppo.learning_rate`, which all weights of a model may want smaller.",
    )
    gae_lambda: Fraction | None = Field(
        None, description="λ of the returns that the critic learns; `null`: that of the advantages."
    )
    warmup_updates: int = Field(
        0, ge=0, description="First updates, in which the critic learns and the policy stays as it is."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> CriticConfig:
        for name, kind in (("stop_gradient", "shared"), ("model", "separate")):
            if getattr(self, name) and self.kind != kind:
                raise ValueError(f"{name} is for kind: {kind}, and this is {self.kind}; leave it out")
        if self.learning_rate is not None and self.kind == "shared":
            raise ValueError(
                "learning_rate is for a critic with weights of its own, and this is shared; leave it out"
            )
        return self


class NetworkConfig(Section):
    """The network of `MlpPolicy` and its kin; names as Stable-Baselines3's `policy_kwargs`."""

    net_arch: list[Positive] | dict[Literal["pi", "vf"], list[Positive]] | None = Field(
        None,
        description="Widths of the hidden layers, for both or `{pi: [64], vf: [64]}`; default `[64, 64]`, none after a CNN.",
    )
    activation: Literal["tanh", "relu", "elu", "gelu", "silu", "leaky_relu"] = Field(
        "tanh", description="Between layers."
    )
    share: bool = Field(
        False, description="One trunk for policy and value instead of two (layers, and LSTM)."
    )
    ortho_init: bool = Field(
        True, description="Orthogonal start: gain √2 within, 0.01 for actions, 1 for the value."
    )
    log_std_init: float = Field(0.0, description="Log standard deviation of continuous actions at the start.")
    use_sde: bool = Field(
        False,
        description="State-dependent exploration for continuous actions (Raffin et al. 2021, arXiv:2005.05719).",
    )
    sde_sample_freq: int = Field(
        -1, ge=-1, description="Steps between two draws of its noise; -1: once an update."
    )
    lstm_hidden_size: Positive = Field(
        256, description="Width of the LSTM of `MlpLstmPolicy` and `CnnLstmPolicy`."
    )


class PolicyConfig(Section):
    """The model that is trained."""

    model: PathText = Field(
        "smollm2-135m-instruct",
        description="A name `surefoot fetch` knows, a local folder, or a Hugging Face hub id; with `env`, the kind of network: `MlpPolicy`, `CnnPolicy`, `MultiInputPolicy`, `MlpLstmPolicy`, `CnnLstmPolicy`.",
    )
    adapter: AdapterConfig | None = Field(
        default_factory=AdapterConfig,
        description="LoRA adapter; `null` trains all weights and keeps a frozen copy as the reference.",
    )
    critic: CriticConfig = Field(default_factory=CriticConfig, description="The value function.")
    network: NetworkConfig = Field(
        default_factory=NetworkConfig, description="The network of `MlpPolicy` and its kin."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic. Trained weights are float32 always; `bfloat16` computes under autocast, a frozen base is also stored in it. `auto`: bfloat16 where the processor has it in hardware, else float32.",
    )

    @model_validator(mode="after")
    def _adapters_together(self) -> PolicyConfig:
        if self.critic.kind == "adapter" and self.adapter is None:
            raise ValueError(
                "critic.kind: adapter needs the frozen base under policy.adapter, which is null; use separate"
            )
        return self


class SelfPlayConfig(Section):
    """Opponents of a two-player game: past selves, the newest self, and a random player."""

    pool_size: Positive = Field(10, description="Past selves kept.")
    snapshot_every: Positive = Field(10, description="Updates between two past selves.")
    latest: Fraction = Field(0.5, description="Share of games against the newest self.")
    random: Fraction = Field(
        0.1, description="Share of games against a player that moves at random; the rest meet past selves."
    )
    random_move_prob: Fraction = Field(
        0.0,
        description="Chance that a self moves at random, move by move: it comes to positions that good play avoids.",
    )

    @model_validator(mode="after")
    def _shares(self) -> SelfPlayConfig:
        if self.latest + self.random > 1:
            raise ValueError(
                f"latest ({self.latest}) and random ({self.random}) are shares of all games; they add up to over 1"
            )
        return self


class EnvConfig(Section):
    """The Gymnasium environment, in place of a text task."""

    id: str | None = Field(
        None,
        description="Gymnasium id, `file.py:function` or `package.module:function` (the function returns an environment), or a two-player game of PettingZoo such as `classic/tictactoe-v3` (with `self_play`, also a function that returns one); `null`: one that was made in Python.",
    )
    total_timesteps: Positive = Field(
        100_000,
        description="Steps in the whole run, all copies together; rounded up to whole updates.",
    )
    n_steps: Positive = Field(
        2048, description="Steps of each copy in one update; with an LSTM 128 by default."
    )
    n_envs: Positive = Field(1, description="Copies that are stepped together.")
    vectorization: Literal["sync", "async", "native"] = Field(
        "sync",
        description="`sync`: one process; `async`: one worker process a copy; `native`: the environment's own vectorised form, for those that have one (Atari, CartPole).",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments for making the environment. For two-player games also `max_moves`, after which a game is cut off.",
    )
    eval_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Changes to `kwargs` for evaluation, such as whole episodes instead of single lives.",
    )
    normalize_observations: bool = Field(
        False,
        description="Shift and scale Box observations by their running mean and deviation, clipped to ±10; saved with the policy.",
    )
    normalize_rewards: bool = Field(
        False, description="Divide rewards by the running deviation of the discounted return, clipped to ±10."
    )
    self_play: SelfPlayConfig | None = Field(
        None,
        description="Opponents of a two-player game; `null`: for PettingZoo's the defaults of these fields.",
    )


class GenerationConfig(Section):
    """How tokens are drawn."""

    max_new_tokens: Positive = Field(24, description="Longest answer, tokens.")
    temperature: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Divides the logits when sampling and when scoring, for policy and reference alike. 0 (greedy) is for generation only.",
    )
    top_k: Positive | None = Field(
        None,
        description="Sample from the k likeliest tokens. Refused in training: the log-probs are over the full vocabulary.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the smallest set with this probability. Refused in training, as top_k.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings that end an answer; the string stays part of it."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="End tokens besides the model's own."
    )
    slots: Positive = Field(
        64, description="Rows decoded at once; waiting prompts take the place of finished rows."
    )
    tis_cap: float | None = Field(
        None,
        gt=0,
        description="c: where the sampler's log-probs are not the trainer's (bfloat16), each token's policy loss is weighted by min(π_trainer / π_sampler, c); `null`: by 1.",
    )


class RolloutConfig(Section):
    """How many episodes of a text task are collected."""

    total_episodes: Positive = Field(
        2000, description="Episodes in the whole run; rounded up to whole updates."
    )
    episodes_per_update: Positive = Field(64, description="Episodes collected for one update.")


class GroupConfig(Section):
    """Several completions of one prompt, compared with each other."""

    size: Positive = Field(
        1, description="G: completions of each prompt in an update. Divides rollout.episodes_per_update."
    )
    skip_zero_variance: bool = Field(
        False,
        description="Leave groups whose rewards are all equal out of the update: their advantages are 0.",
    )


class KLConfig(Section):
    """The penalty for moving away from the reference model."""

    coef: NonNegative = Field(0.05, description="β of the per-token KL penalty against the reference.")
    placement: Literal["reward", "loss"] = Field(
        "reward",
        description="Where β's penalty stands: in the `reward` (k1), or in the `loss` (k2 with the importance ratio).",
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Adapt β to hold the mean sequence KL near this many nats, as fast as horizon says; `null` keeps β fixed.",
    )
    horizon: float = Field(
        10_000.0,
        gt=0,
        description="Episodes in which the adaptive β moves by at most 20 %; a short run wants fewer, more than a fifth of an update's.",
    )


class ShapingConfig(Section):
    """From the reward a function gave to the reward the policy gets, in this order."""

    missing_eos_penalty: NonNegative | None = Field(
        None, description="Charged when a completion was cut off by the length limit; `null`: nothing."
    )
    scale: Literal["none", "running_std"] = Field(
        "none", description="Divide rewards by their running standard deviation."
    )
    clip: float | None = Field(None, gt=0, description="Clip rewards to ± this, after scaling.")
    whiten: bool = Field(False, description="Whiten per-token rewards over the update, keeping their mean.")


class PTXConfig(Section):
    """Demonstrations whose negative log-likelihood is added to PPO's loss (PPO-ptx; Ouyang et al. 2022, arXiv:2203.02155)."""

    data: ExamplesFile = None
    columns: ExamplesColumns = Field(default_factory=dict)
    held_out: HeldOut = 0.1
    max_tokens: ExamplesMaxTokens = None
    batch_size: Positive = Field(
        16, description="Demonstrations added to each minibatch; all of them where there are fewer."
    )
    coef: NonNegative = Field(
        0.5,
        description="Weight of their mean negative log-likelihood per token in the loss; 0: they are evaluated alone.",
    )
    schedule: Schedule = Field("constant", description="How coef moves over the run.")


class PPOConfig(Section):
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"] = Field(
        "gae",
        description="What an answer is compared with (docs/family.md); all but `gae` do without a critic.",
    )
    batch_size: Positive = Field(
        16,
        description="Episodes (with `env`: timesteps) in a minibatch, one optimiser step. Divides episodes_per_update.",
    )
    n_epochs: Positive = Field(2, description="Passes over the episodes of an update.")
    learning_rate: float = Field(3e-4, gt=0, description="Adam's step size at its highest.")
    lr_schedule: Schedule | Literal["function"] = Field(
        "constant",
        description="How the learning rate moves over the run; `function`: by one that was given in Python.",
    )
    lr_warmup: LearningRateWarmup = 0.0
    adam_epsilon: AdamEpsilon = 1e-5
    max_grad_norm: MaxGradNorm = 1.0
    clip_range: float = Field(0.2, gt=0, description="ε of the clipped surrogate.")
    clip_schedule: Schedule | Literal["function"] = Field("constant", description="How ε moves over the run.")
    clip_range_high: float | None = Field(
        None,
        gt=0,
        description="ε of the upper bound, above which a better step is not pushed; `null`: clip_range.",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="c: a worse step's loss is at most c |A|, however large its ratio; `null`: no bound.",
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="What the loss is a mean over: all written tokens of the minibatch; its answers, each the mean of its tokens; or, `constant`, answers × max_new_tokens.",
    )
    clip_range_vf: float | None = Field(
        None, gt=0, description="Clip of the value's move; `null` leaves it unclipped."
    )
    gamma: Fraction = Field(1.0, description="Discount per written token.")
    gae_lambda: Fraction = Field(0.95, description="λ of generalised advantage estimation.")
    normalize_advantage: bool = Field(
        True,
        description="Whiten advantages over each minibatch; with `advantage: gae` alone, the others have a scale of their own.",
    )
    vf_coef: NonNegative = Field(0.1, description="Weight of the value loss.")
    value_loss: Literal["half_squared", "squared"] = Field(
        "half_squared",
        description="½ (V - R)² as TRL's `vf_coef` means it, or (V - R)² as Stable-Baselines3's does.",
    )
    ent_coef: NonNegative = Field(0.0, description="Weight of the entropy bonus.")
    ent_schedule: Schedule = Field("constant", description="How ent_coef moves over the run.")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="Trust region δ: the update stops before a step once a minibatch's KL(old‖new) passes this, nats per token; `null`: no stop.",
    )
    micro_batch_tokens: MicroBatchTokens = 2048
    max_bad_steps: MaxBadSteps = 5

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a value function, which is trained then."""
        return self.advantage == "gae"


class EvaluateConfig(Section):
    """Evaluation on held-out prompts."""

    every: Positive | None = Field(
        10,
        description="Updates between evaluations, with `sft` or `reward_model` by default 25; `null`: only at start and end.",
    )
    episodes: int = Field(
        64,
        ge=0,
        description="Held-out prompts (with `env`: episodes; with `sft` or `reward_model`: examples, by default 128) used, the same each time; 0: none.",
    )

"""The algorithm: the sections `ppo`, of all runs with rewards, and `kl`, of those with a reference model."""

from __future__ import annotations

from typing import Literal

from surefoot.config import fields as f
from surefoot.config.fields import Section, setting


class PPOConfig(Section):
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; text: Ziegler et al. 2019, arXiv:1909.08593)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"] = setting(
        "gae", "Advantage estimator (docs/family.md); all but `gae` are for text and train no critic."
    )
    batch_size: f.Positive = setting(
        16, "Episodes (with `env`: timesteps) in a minibatch; of text it divides rollout.episodes_per_update."
    )
    n_epochs: f.Positive = setting(2, "Passes over the data of an update.")
    learning_rate: float = setting(3e-4, "Adam's peak learning rate.", gt=0)
    lr_schedule: f.Schedule | Literal["function"] = setting(
        "constant", "Learning rate schedule over the run; `function`: one that was given in Python."
    )
    lr_warmup: f.LearningRateWarmup = 0.0
    adam_epsilon: f.AdamEpsilon = 1e-5
    max_grad_norm: f.MaxGradNorm = 1.0
    clip_range: float = setting(0.2, "ε of the clipped surrogate.", gt=0)
    clip_schedule: f.Schedule | Literal["function"] = setting("constant", "Schedule of ε over the run.")
    clip_range_high: float | None = setting(None, "ε of the ratio's upper bound; `null`: clip_range.", gt=0)
    dual_clip: float | None = setting(
        None, "c: where the advantage is negative the loss is at most c |A|; `null`: no bound.", gt=1
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = setting(
        "token",
        "The loss is a mean over all completion tokens of the minibatch (`token`), over completions, each a "
        "mean of its tokens (`sequence`), or over completions × max_new_tokens (`constant`).",
    )
    clip_range_vf: float | None = setting(None, "Clip range of the value's change; `null`: unclipped.", gt=0)
    gamma: f.Fraction = setting(1.0, "Discount per step (of text: per completion token).")
    gae_lambda: f.Fraction = setting(0.95, "λ of generalized advantage estimation.")
    normalize_advantage: bool = setting(True, "Whiten advantages over each minibatch; with `gae` only.")
    vf_coef: f.NonNegative = setting(0.1, "Weight of the value loss.")
    value_loss: Literal["half_squared", "squared"] = setting(
        "half_squared", "½ (V - R)², as TRL's `vf_coef` means it, or (V - R)², as Stable-Baselines3's does."
    )
    ent_coef: f.NonNegative = setting(0.0, "Weight of the entropy bonus.")
    ent_schedule: f.Schedule = setting("constant", "Schedule of ent_coef over the run.")
    target_kl: float | None = setting(
        None, "Early stop: an update ends once a minibatch's KL(old‖new) exceeds this, nats per token.", gt=0
    )
    micro_batch_tokens: f.MicroBatchTokens = 2048
    max_bad_steps: f.MaxBadSteps = 5

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a value function, which is trained then."""
        return self.advantage == "gae"


class KLConfig(Section):
    """The penalty for moving away from the reference model."""

    coef: f.NonNegative = setting(0.05, "β of the per-token KL penalty.")
    placement: Literal["reward", "loss"] = setting(
        "reward", "The penalty stands in the `reward` (k1), or in the `loss` (k2 with the importance ratio)."
    )
    target: float | None = setting(
        None, "Adaptive β: hold the mean sequence KL near this many nats; `null`: β is fixed.", gt=0
    )
    horizon: float = setting(
        10_000.0,
        "Episodes in which the adaptive β changes by at most 20 %; over a fifth of an update's.",
        gt=0,
    )

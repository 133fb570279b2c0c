"""The algorithm: the section `ppo`, of all runs with rewards, and `kl`, `group`, `shaping`, of text."""

from typing import Literal

from surefoot.config import fields as f
from surefoot.config.fields import OptimizerFields, Section, setting


class PPOConfig(OptimizerFields):
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; text: Ziegler et al. 2019, arXiv:1909.08593)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"] = setting(
        "gae", "Advantage estimator (docs/family.md); all but `gae` are for text and train no critic."
    )
    batch_size: f.Positive = setting(16, "Episodes (with `env`: timesteps) in one minibatch.")
    n_epochs: f.Positive = setting(2, "Passes over the data of an update.")
    learning_rate: float = setting(3e-4, "Adam's peak learning rate.", gt=0)
    lr_schedule: f.Schedules = setting(  # type: ignore[assignment]  # one more than supervised runs have
        "constant", "Learning rate schedule over the run; `function`: one that was given in Python."
    )
    lr_warmup: f.Fraction = setting(0.0, "Fraction of the run in which the learning rate rises from 0.")
    adam_epsilon: float = setting(1e-5, "Adam's epsilon.", gt=0)
    optimizer: Literal["adam", "rmsprop"] = setting("adam", "`rmsprop`: A2C's; decay 0.99, `adam_epsilon`.")
    clip_range: float = setting(0.2, "ε of the clipped surrogate.", gt=0)
    clip_schedule: f.Schedules = setting("constant", "Schedule of ε over the run, likewise.")
    clip_range_high: float | None = setting(None, "ε of the ratio's upper bound; `null`: clip_range.", gt=0)
    policy_loss: Literal["clipped", "cispo"] = setting(
        "clipped", "The clipped surrogate, or CISPO: -sg(min(ρ, 1 + ε_high)) A log π, for text."
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "Ratio ρ of each token, or of a whole completion, by its mean log-ratio (GSPO), for text."
    )
    dual_clip: float | None = setting(None, "c: the loss is ≤ c |A| where A < 0; `null`: no bound.", gt=1)
    loss_aggregation: Literal["token", "sequence", "constant"] = setting(
        "token", "Mean over tokens, over sequences' means, or sum over completions × max_new_tokens."
    )
    mask_truncated: bool = setting(False, "Completions that max_new_tokens cut have no loss; for text.")
    clip_range_vf: float | None = setting(None, "Clip range of the value's change; `null`: unclipped.", gt=0)
    gamma: f.Fraction = setting(1.0, "Discount per step (of text: per completion token).")
    gae_lambda: f.Fraction = setting(0.95, "λ of generalized advantage estimation.")
    normalize_advantage: bool = setting(True, "Whiten advantages over each minibatch; with `gae` only.")
    vf_coef: f.NonNegative = setting(0.1, "Weight of the value loss.")
    value_loss: Literal["half_squared", "squared"] = setting(
        "half_squared", "½ (V - R)², as in TRL, or (V - R)², as in Stable-Baselines3."
    )
    ent_coef: f.NonNegative = setting(0.0, "Weight of the entropy bonus.")
    ent_schedule: f.Schedule = setting("constant", "Schedule of ent_coef over the run.")
    target_kl: float | None = setting(None, "Stop an update once KL(old‖new) per token exceeds this.", gt=0)

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a value function, which is trained then."""
        return self.advantage == "gae"


class KLConfig(Section):
    """The penalty for moving away from the reference model."""

    coef: f.NonNegative = setting(0.05, "β of the per-token KL penalty.")
    placement: Literal["reward", "loss"] = setting("reward", "In the reward (k1), or in the loss (k2).")
    target: float | None = setting(None, "Adaptive β: holds sequence KL near this; `null`: β is fixed.", gt=0)
    horizon: float = setting(1e4, "Episodes in which adaptive β moves ≤ 20 %; over 1/5 of an update's.", gt=0)


class GroupConfig(Section):
    """Several completions of one prompt, compared with each other."""

    size: f.Positive = setting(1, "G: completions per prompt; divides rollout.episodes_per_update.")
    skip_zero_variance: bool = setting(False, "Leave groups whose rewards are all equal out of the update.")


class ShapingConfig(Section):
    """From the reward function's result to the reward that is trained on, in this order."""

    missing_eos_penalty: f.NonNegative | None = setting(None, "Subtracted if max_new_tokens cut; `null`: 0.")
    scale: Literal["none", "running_std"] = setting("none", "Divide rewards by their running std, or not.")
    clip: float | None = setting(None, "Clip rewards to ± this, after scaling.", gt=0)
    whiten: bool = setting(False, "Whiten per-token rewards over the update, keeping their mean.")

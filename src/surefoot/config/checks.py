"""Settings that contradict each other, and how to fix them: one line each, as ValueError."""

from __future__ import annotations

import math

from surefoot.config.env import EnvConfig
from surefoot.config.messages import short
from surefoot.config.policy import NETWORKS, CriticConfig, PolicyConfig
from surefoot.config.ppo import GroupConfig, KLConfig, PPOConfig, ShapingConfig
from surefoot.config.rollout import GenerationConfig, RejectionSamplingConfig, RolloutConfig

# Advantages that compare the completions of one prompt with each other.
GROUPED = ("grpo", "dr_grpo", "rloo")


def check_supervised(name: str, critic: CriticConfig) -> None:
    """Raise ValueError: what a run of `sft` or `reward_model`, by that name, cannot have."""
    if critic.model_copy(update={"stop_gradient": False}) != CriticConfig():
        raise ValueError(f"policy.critic: a run of {name} has no critic; leave the section out")


def check_rollout(
    rollout: RolloutConfig, group: GroupConfig, generation: GenerationConfig, batch_size: int
) -> None:
    """Raise ValueError: sizes that do not divide an update, and sampling that cannot be trained on."""
    whole = rollout.episodes_per_update
    for key, size in {"ppo.batch_size": batch_size, "group.size": group.size}.items():
        if whole % size:
            near, of = _nearest_divisor(whole, size), f"rollout.episodes_per_update ({whole})"
            raise ValueError(f"{key} ({size}) does not divide {of}; try {near}")
    for name in ("top_k", "top_p"):
        if getattr(generation, name) is not None:
            raise ValueError(f"generation.{name}: training needs the full vocabulary; leave it out")
    if generation.temperature == 0:
        raise ValueError("generation.temperature: training needs more than 0 (greedy); leave it out")


def check_advantage(ppo: PPOConfig, group: GroupConfig, shaping: ShapingConfig, critic: CriticConfig) -> None:
    """Raise ValueError: what the advantage needs and is not there, or has no use for."""
    kind = ppo.advantage
    if kind in GROUPED and group.size == 1:
        raise ValueError(f"ppo.advantage: {kind} compares completions of a prompt; give group.size 2 or more")
    if group.skip_zero_variance and kind not in GROUPED:
        raise ValueError(f"group.skip_zero_variance is for ppo.advantage: {', '.join(GROUPED)}, not {kind}")
    if critic.warmup_updates and critic.kind == "shared" and not critic.stop_gradient:
        raise ValueError(
            "policy.critic.warmup_updates trains the critic alone, but its loss would move the shared trunk; "
            "set policy.critic.stop_gradient: true, or another policy.critic.kind"
        )
    if ppo.has_critic:
        return
    used = {
        "ppo.clip_range_vf": ppo.clip_range_vf is not None,
        "shaping.whiten": shaping.whiten,
        "policy.critic.gae_lambda": critic.gae_lambda is not None,
        "policy.critic.warmup_updates": critic.warmup_updates > 0,
    }
    if name := next((name for name, is_used in used.items() if is_used), None):
        raise ValueError(f"{name} is for ppo.advantage: gae; {kind} has no critic")
    if ppo.gamma != 1 and kind != "reinforce_pp":
        raise ValueError(f"ppo.gamma: with {kind} the tokens of a completion share its reward; leave it out")


def check_kl(kl: KLConfig, rollout: RolloutConfig) -> None:
    """Raise ValueError: an adaptive coefficient that could not adapt, or could turn negative."""
    least = 0.2 * rollout.episodes_per_update
    if kl.target is not None and kl.coef == 0:
        raise ValueError("kl.target adapts kl.coef, and 0 would stay 0; give kl.coef a positive start")
    if kl.target is not None and least >= kl.horizon:
        # An update changes kl.coef by up to 20 % × episodes / horizon.
        raise ValueError(f"kl.horizon ({kl.horizon:g}) could take kl.coef below 0; give more than {least:g}")


def check_rejection(rejection: RejectionSamplingConfig, group: GroupConfig, *, has_task: bool) -> None:
    """Raise ValueError: rejection sampling without prompts, or of groups that do not divide it."""
    size, whole = group.size, rejection.episodes
    if not has_task:
        raise ValueError("rejection_sampling completes the prompts of a task; give it a task section")
    if whole % size:
        raise ValueError(f"group.size ({size}) does not divide rejection_sampling.episodes ({whole})")


def check_environment(env: EnvConfig, ppo: PPOConfig, policy: PolicyConfig) -> None:
    """Raise ValueError: what an environment cannot have."""
    for name in ("advantage", "loss_aggregation"):
        if getattr(ppo, name) != PPOConfig.model_fields[name].default:
            raise ValueError(f"ppo.{name} is for text tasks; leave it out")
    if policy.critic.model_copy(update={"gae_lambda": None}) != CriticConfig():
        raise ValueError("policy.critic is for text tasks; with env use policy.network.share")
    if policy.model not in NETWORKS:
        raise ValueError(f"policy.model: {short(policy.model)}; with env it is one of {', '.join(NETWORKS)}")
    if "Lstm" in policy.model and ppo.batch_size % env.n_steps:
        multiple = env.n_steps * max(1, round(ppo.batch_size / env.n_steps))
        raise ValueError(
            f"ppo.batch_size ({ppo.batch_size}) is not a multiple of env.n_steps ({env.n_steps}): recurrent "
            f"policies are trained on whole sequences; try {multiple}"
        )


def check_clip(ppo: PPOConfig) -> None:
    """Raise ValueError: a schedule that moves one of two bounds."""
    if ppo.clip_range_high is not None and ppo.clip_schedule != "constant":
        raise ValueError("ppo.clip_schedule moves ppo.clip_range alone; leave ppo.clip_range_high out")


def _nearest_divisor(whole: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))

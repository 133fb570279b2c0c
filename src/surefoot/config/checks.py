"""Settings that contradict each other, and how to mend them: one line each, as ValueError."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surefoot.config.messages import short
from surefoot.config.sections import PPOConfig

if TYPE_CHECKING:
    from surefoot.config import Config

NETWORKS = (
    "MlpPolicy",
    "CnnPolicy",
    "MultiInputPolicy",
    "MlpLstmPolicy",
    "CnnLstmPolicy",
    "MultiInputLstmPolicy",
)
# Settings of the algorithm that mean something for one side only.
TEXT_ONLY = (
    "total_episodes",
    "episodes_per_update",
    "samples_per_prompt",
    "advantage",
    "skip_equal_groups",
    "gae_lambda_length_alpha",
    "critic_warmup_updates",
    "loss_aggregation",
    "kl_in",
    "sampler_ratio_cap",
    "ptx",
    "missing_eos_penalty",
    "missing_eos_mode",
    "reward_scale",
)
ENV_ONLY = ("total_timesteps", "n_steps")
# Advantages that compare the answers to one prompt with each other, and settings that mean nothing without a critic.
GROUPED = ("grpo", "dr_grpo", "rloo")
CRITIC_ONLY = (
    "clip_range_vf",
    "whiten_rewards",
    "gae_lambda_critic",
    "gae_lambda_length_alpha",
    "critic_warmup_updates",
)


def check_algorithm(ppo: PPOConfig) -> None:
    """Raise ValueError: settings of the algorithm that contradict each other."""
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        raise ValueError(
            "ppo.kl_target adapts ppo.kl_coef, which is 0 and would stay 0; give kl_coef a positive start"
        )
    if ppo.missing_eos_mode == "replace" and ppo.missing_eos_penalty is None:
        raise ValueError(
            "ppo.missing_eos_mode: replace needs a ppo.missing_eos_penalty to put in the score's place"
        )
    if ppo.clip_range_high is not None and ppo.clip_schedule != "constant":
        raise ValueError(
            "ppo.clip_schedule moves ppo.clip_range alone; leave it, or ppo.clip_range_high, out"
        )
    if ppo.advantage in GROUPED and ppo.samples_per_prompt == 1:
        raise ValueError(
            f"ppo.advantage: {ppo.advantage} compares the answers to one prompt; give ppo.samples_per_prompt, now 1, 2 or more"
        )
    if ppo.skip_equal_groups and ppo.advantage not in GROUPED:
        raise ValueError(
            f"ppo.skip_equal_groups is for ppo.advantage: {', '.join(GROUPED)}; {ppo.advantage} learns from them too"
        )
    if not ppo.has_critic:
        _check_unused(ppo, CRITIC_ONLY, f"is for ppo.advantage: gae; {ppo.advantage} has no critic")
        if ppo.gamma != 1 and ppo.advantage != "reinforce_pp":
            raise ValueError(
                f"ppo.gamma is {ppo.gamma:g}; with ppo.advantage: {ppo.advantage} the tokens of an answer share its reward; "
                "leave it out"
            )


def check_supervised(config: Config, name: str) -> None:
    """Raise ValueError: what a run of `sft` or `reward_model`, by that name, cannot have."""
    for other in ("task", "env", "reward_model"):
        if other != name and getattr(config, other) is not None:
            raise ValueError(
                f"a run has one of task, env and {name}, and here are {other} and {name}; leave one out"
            )
    if config.policy.critic.kind != "shared":
        raise ValueError(
            f"policy.critic: a run of {name} learns no values and has no critic; leave the section out"
        )
    if config.ppo != PPOConfig():
        run = "an sft" if name == "sft" else f"a {name}"
        raise ValueError(
            f"ppo: {run} run has no use for these settings; leave the section out, its own are under {name}"
        )


def check_text(config: Config) -> None:
    """Raise ValueError: what a text task cannot have."""
    ppo, generation = config.ppo, config.generation
    _check_unused(ppo, ENV_ONLY, "needs an env section; a text task counts episodes")
    if ppo.episodes_per_update % ppo.batch_size:
        raise ValueError(
            f"ppo.batch_size ({ppo.batch_size}) does not divide ppo.episodes_per_update ({ppo.episodes_per_update}); "
            f"try {_nearest_divisor(ppo.episodes_per_update, ppo.batch_size)}"
        )
    if ppo.episodes_per_update % ppo.samples_per_prompt:
        raise ValueError(
            f"ppo.samples_per_prompt ({ppo.samples_per_prompt}) does not divide ppo.episodes_per_update "
            f"({ppo.episodes_per_update}); try {_nearest_divisor(ppo.episodes_per_update, ppo.samples_per_prompt)}"
        )
    if ppo.kl_target is not None and 0.2 * ppo.episodes_per_update >= ppo.kl_horizon:
        raise ValueError(
            f"ppo.kl_horizon ({ppo.kl_horizon:g}) is too short: ppo.kl_coef moves by up to 20 % in so many episodes, and an update "
            f"of {ppo.episodes_per_update} could take it to 0 or below; give more than {0.2 * ppo.episodes_per_update:g}"
        )
    critic = config.policy.critic
    if ppo.critic_warmup_updates and critic.kind == "shared" and not critic.stop_gradient:
        raise ValueError(
            "ppo.critic_warmup_updates trains the critic alone, but its loss would move the trunk it shares with the policy; "
            "set policy.critic.stop_gradient: true, or give it weights of its own by policy.critic.kind"
        )
    for name in ("top_k", "top_p"):
        if getattr(generation, name) is not None:
            raise ValueError(
                f"generation.{name} contradicts training: log-probs are over the full vocabulary; leave it out"
            )
    if generation.temperature == 0:
        raise ValueError(
            "generation.temperature 0 is greedy and cannot be trained on; use a positive temperature"
        )


def check_environment(config: Config) -> None:
    """Raise ValueError: what an environment cannot have."""
    assert config.env is not None
    ppo, model = config.ppo, config.policy.model
    if config.task is not None:
        raise ValueError("a run has a task (text) or an env (Gymnasium), not both; leave one out")
    _check_unused(ppo, TEXT_ONLY, "is for text tasks; leave it out")
    if config.policy.critic.kind != "shared":
        raise ValueError(
            "policy.critic is for text tasks; with env policy.network.share says whether policy and value share"
        )
    if ppo.kl_coef or ppo.kl_target is not None:
        raise ValueError(
            "ppo.kl_coef needs a reference model, which a network that starts from nothing has not; leave it out"
        )
    if model not in NETWORKS:
        raise ValueError(f"policy.model is {short(model)}; with env it is one of {', '.join(NETWORKS)}")
    if "Lstm" in model and ppo.batch_size % ppo.n_steps:
        raise ValueError(
            f"ppo.batch_size ({ppo.batch_size}) is not a multiple of ppo.n_steps ({ppo.n_steps}): {model} is trained on whole "
            f"sequences; try {ppo.n_steps * max(1, round(ppo.batch_size / ppo.n_steps))}"
        )


def _check_unused(ppo: PPOConfig, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(ppo, name) != PPOConfig.model_fields[name].default:
            raise ValueError(f"ppo.{name} {why}")


def _nearest_divisor(whole: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))

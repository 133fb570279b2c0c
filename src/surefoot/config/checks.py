"""Settings that contradict each other, and how to mend them: one line each, as ValueError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surefoot.config.messages import short
from surefoot.config.sections import CriticConfig, PPOConfig

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
# The sections by which a run is of a kind; one without any of them is a text task that is given in Python.
KINDS = ("task", "env", "sft", "reward_model")
COMMON = ("seed", "device", "run", "policy", "evaluate")
SECTIONS = {
    "task": ("task", "generation", "rollout", "ppo", "kl", "group", "shaping", "ptx", "rejection_sampling"),
    "env": ("env", "ppo"),
    "sft": ("sft", "new_model", "generation"),
    "reward_model": ("reward_model", "generation"),
}
# Advantages that compare the completions of one prompt with each other.
GROUPED = ("grpo", "dr_grpo", "rloo")


def kind_of(given: Sequence[str]) -> str:
    """The kind of run that has the sections `given`."""
    return next((name for name in KINDS if name in given), "task")


def foreign_sections(kind: str) -> frozenset[str]:
    """Sections that a run of that kind does not have."""
    return frozenset(name for sections in SECTIONS.values() for name in sections) - {*SECTIONS[kind]}


def check_sections(given: Sequence[str]) -> None:
    """Raise ValueError: sections that do not go together."""
    kinds = [name for name in KINDS if name in given]
    if len(kinds) > 1:
        raise ValueError(
            f"a run has one of {', '.join(KINDS)}, and here are {' and '.join(kinds)}; leave one out"
        )
    kind = kind_of(given)
    for name in given:
        if name in foreign_sections(kind):
            run = "a text task" if kind == "task" else f"a run with {kind}"
            raise ValueError(f"{name}: {run} has no such section; leave it out")


def check_supervised(config: Config, name: str) -> None:
    """Raise ValueError: what a run of `sft` or `reward_model`, by that name, cannot have."""
    if config.policy.critic.model_copy(update={"stop_gradient": False}) != CriticConfig():
        raise ValueError(
            f"policy.critic: a run of {name} learns no values and has no critic; leave the section out"
        )


def check_text(config: Config) -> None:
    """Raise ValueError: settings of a text task that contradict each other."""
    ppo, kl, group, critic = config.ppo, config.kl, config.group, config.policy.critic
    if (rejection := config.rejection_sampling) is not None:
        if config.task is None:
            raise ValueError("rejection_sampling completes the prompts of a task; give it a task section")
        if rejection.episodes % group.size:
            raise ValueError(
                f"group.size ({group.size}) does not divide rejection_sampling.episodes ({rejection.episodes})"
            )
    episodes = config.rollout.episodes_per_update
    if kl.target is not None and kl.coef == 0:
        raise ValueError(
            "kl.target adapts kl.coef, which is 0 and would stay 0; give kl.coef a positive start"
        )
    _check_clip(ppo)
    if ppo.advantage in GROUPED and group.size == 1:
        raise ValueError(
            f"ppo.advantage: {ppo.advantage} compares the answers to one prompt; give group.size, now 1, 2 or more"
        )
    if group.skip_zero_variance and ppo.advantage not in GROUPED:
        raise ValueError(
            f"group.skip_zero_variance is for ppo.advantage: {', '.join(GROUPED)}; {ppo.advantage} learns from them too"
        )
    if not ppo.has_critic:
        used = {
            "ppo.clip_range_vf": ppo.clip_range_vf is not None,
            "shaping.whiten": config.shaping.whiten,
            "policy.critic.gae_lambda": critic.gae_lambda is not None,
            "policy.critic.warmup_updates": critic.warmup_updates > 0,
        }
        if name := next((name for name, is_used in used.items() if is_used), None):
            raise ValueError(f"{name} is for ppo.advantage: gae; {ppo.advantage} has no critic")
        if ppo.gamma != 1 and ppo.advantage != "reinforce_pp":
            raise ValueError(
                f"ppo.gamma is {ppo.gamma:g}; with ppo.advantage: {ppo.advantage} the tokens of an answer share its reward; "
                "leave it out"
            )
    for key, size in {"ppo.batch_size": ppo.batch_size, "group.size": group.size}.items():
        if episodes % size:
            raise ValueError(
                f"{key} ({size}) does not divide rollout.episodes_per_update ({episodes}); "
                f"try {_nearest_divisor(episodes, size)}"
            )
    if kl.target is not None and 0.2 * episodes >= kl.horizon:
        raise ValueError(
            f"kl.horizon ({kl.horizon:g}) is too short: kl.coef moves by up to 20 % in so many episodes, and an update "
            f"of {episodes} could take it to 0 or below; give more than {0.2 * episodes:g}"
        )
    if critic.warmup_updates and critic.kind == "shared" and not critic.stop_gradient:
        raise ValueError(
            "policy.critic.warmup_updates trains the critic alone, but its loss would move the trunk it shares with the policy; "
            "set policy.critic.stop_gradient: true, or give it weights of its own by policy.critic.kind"
        )
    for name in ("top_k", "top_p"):
        if getattr(config.generation, name) is not None:
            raise ValueError(
                f"generation.{name} contradicts training: log-probs are over the full vocabulary; leave it out"
            )
    if config.generation.temperature == 0:
        raise ValueError(
            "generation.temperature 0 is greedy and cannot be trained on; use a positive temperature"
        )


def check_environment(config: Config) -> None:
    """Raise ValueError: what an environment cannot have."""
    assert config.env is not None
    ppo, model, n_steps = config.ppo, config.policy.model, config.env.n_steps
    _check_clip(ppo)
    for name in ("advantage", "loss_aggregation"):
        if getattr(ppo, name) != PPOConfig.model_fields[name].default:
            raise ValueError(f"ppo.{name} is for text tasks; leave it out")
    if config.policy.critic.model_copy(update={"gae_lambda": None}) != CriticConfig():
        raise ValueError(
            "policy.critic is for text tasks; with env policy.network.share says whether policy and value share"
        )
    if model not in NETWORKS:
        raise ValueError(f"policy.model is {short(model)}; with env it is one of {', '.join(NETWORKS)}")
    if "Lstm" in model and ppo.batch_size % n_steps:
        raise ValueError(
            f"ppo.batch_size ({ppo.batch_size}) is not a multiple of env.n_steps ({n_steps}): {model} is trained on whole "
            f"sequences; try {n_steps * max(1, round(ppo.batch_size / n_steps))}"
        )


def _check_clip(ppo: PPOConfig) -> None:
    if ppo.clip_range_high is not None and ppo.clip_schedule != "constant":
        raise ValueError(
            "ppo.clip_schedule moves ppo.clip_range alone; leave it, or ppo.clip_range_high, out"
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    return min((*small, *(whole // d for d in small)), key=lambda d: (abs(d - wanted), d))

"""The metrics of an update: their names, what each means, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from surefoot.core.kl import k3
from surefoot.core.masked import explained_variance, masked_mean
from surefoot.rollout.batch import has_reward_variance
from surefoot.rollout.logprobs import sequence_kl
from surefoot.train.update import UpdateResult
from surefoot.types import Batch

# Name -> meaning. docs/metrics.md is written from this; a metric that is not here cannot be logged.
METRICS = {
    "episodes": "Episodes played so far in the run.",
    "reward/mean": "Mean score the reward function gave this update's episodes, before penalty, scaling and clipping.",
    "reward/std": "Population standard deviation of those scores.",
    "reward/part/<label>": "With several rewards: mean of what that part gave, before its weight.",
    "reward/zero_variance_groups": "Groups of answers to one prompt whose rewards are all equal: compared with each other they teach nothing. With group.skip_zero_variance they are left out of the update.",
    "reward/shaped": "Mean reward after penalty, scaling and clipping, before the KL penalty: what the policy is paid.",
    "kl/reference": "KL to the reference: log p - log p_ref summed over an episode's written tokens, mean over episodes; nats.",
    "kl/reference_k3": "The same by the k3 estimator, which is never negative and has less variance; nats.",
    "kl/coef": "β, the weight of the KL penalty in the reward or the loss (`kl.placement`), as used in this update.",
    "ppo/policy_loss": "Clipped surrogate loss, mean over written tokens and minibatches.",
    "ppo/approx_kl": "KL(old‖new) by k3, mean over written tokens and minibatches; nats per token.",
    "ppo/clip_fraction": "Share of written tokens whose ratio left [1 - ε, 1 + ε].",
    "ppo/ratio_mean": "Mean of π_new / π_old over written tokens and minibatches.",
    "ppo/ratio_max": "Largest π_new / π_old.",
    "ppo/stopped_early": "1 if the trust region (target_kl) ended the update before its last epoch, else 0.",
    "ppo/grad_norm": "Gradient norm before clipping, mean over the steps taken.",
    "ppo/learning_rate": "Adam's step size in this update.",
    "ppo/skipped_steps": "Optimiser steps skipped so far because loss or gradient was not finite.",
    "ptx/loss": "With ptx: negative log-likelihood of the demonstrations' trained tokens before each step, mean over those of the update's minibatches; nats per token.",
    "ptx/coef": "With ptx: the weight of that loss in this update; 0 also while the critic alone learns.",
    "sft/nll": "Negative log-likelihood of the trained tokens before the step, mean over them; nats per token.",
    "sft/epoch": "Passes over the examples so far.",
    "sft/grad_norm": "With sft: gradient norm before clipping.",
    "sft/learning_rate": "With sft: Adam's step size in this update.",
    "sft/skipped_steps": "With sft: optimiser steps skipped so far because loss or gradient was not finite.",
    "reward_model/loss": "Loss of a reward model before the step, mean over the update's preferences: for pairs nats, for ratings half the squared error in units of their variance.",
    "reward_model/epoch": "With reward_model: passes over the preferences so far.",
    "reward_model/grad_norm": "With reward_model: gradient norm before clipping.",
    "reward_model/learning_rate": "With reward_model: Adam's step size in this update.",
    "reward_model/skipped_steps": "With reward_model: optimiser steps skipped so far because loss or gradient was not finite.",
    "critic/value_loss": "½ (V - R)², clipped if asked for, mean over written tokens and minibatches.",
    "critic/explained_variance": "1 - Var(R - V) / Var(R) before the update: 1 is perfect, 0 no better than a constant.",
    "critic/clip_fraction": "Share of written tokens whose value moved further than clip_range_vf; 0 without clipping.",
    "critic/value_mean": "Mean value over written tokens before the update.",
    "critic/return_mean": "Mean TD(λ) return over written tokens.",
    "policy/entropy": "Entropy of the distribution each token is drawn from, exact, mean over written tokens and minibatches; nats.",
    "length/mean": "Written tokens per episode (with sft: trained tokens per example; with reward_model: tokens of a text), the end token included.",
    "length/end_rate": "Share of episodes that ended by an end token or stop string, not by the length limit.",
    "sampler/mismatch_mean": "Mean of |log p_trainer - log p_sampler| over written tokens, where the two differ (bfloat16); nats.",
    "sampler/mismatch_max": "Largest such difference; nats.",
    "time/rollout_s": "Seconds spent writing answers.",
    "time/score_s": "Seconds spent on the reward function, the reference and old log-probs.",
    "time/update_s": "Seconds spent on advantages and optimiser steps.",
    "throughput/tokens_per_s": "Written tokens (with reward_model: those of the longer text of each pair) per second of rollout, score and update together.",
    "throughput/steps_per_s": "Timesteps per second of rollout, score and update together.",
    "examples": "With sft and reward_model: examples learned from so far in the run, counted again in every epoch.",
    "timesteps": "Timesteps played so far in the run, all copies of the environment together.",
    "rollout/ep_rew_mean": "Mean return (sum of rewards as the environment gave them) of the last 100 finished episodes.",
    "rollout/ep_len_mean": "Mean length of those episodes, timesteps.",
    "selfplay/games": "With self-play: games finished in this update.",
    "selfplay/win_rate": "Mean score of the learner in those games, whoever the opponent: 1 won, ½ drawn or cut off, 0 lost.",
    "selfplay/elo": "The learner's Elo by its games against past selves and the random player, who is held at 0.",
    "eval/reward": "Mean score of the reward function on held-out prompts.",
    "eval/part/<label>": "With several rewards: mean of that part on held-out prompts, before its weight.",
    "eval/metric": "Mean of the task's metric on held-out prompts; the reward if the task has none; with sft, -eval/nll; with reward_model, -eval/loss. The best checkpoint is kept by it.",
    "eval/nll": "With sft: negative log-likelihood of the held-out examples' trained tokens, mean over all of them; nats per token.",
    "eval/perplexity": "e to the eval/nll: 1 is certainty, the vocabulary's size is knowing nothing.",
    "eval/ptx_perplexity": "With ptx: e to the negative log-likelihood of the held-out demonstrations' trained tokens at generation.temperature, mean over all of them.",
    "eval/loss": "With reward_model: its loss on the held-out preferences, as `reward_model/loss`.",
    "eval/accuracy": "With reward_model: share of held-out pairs whose chosen text has the higher score; of ratings, of all pairs of unlike ratings, the share whose scores stand in the same order. Equal scores count half.",
    "eval/pearson": "With reward_model: correlation of scores and ratings on held-out texts.",
    "eval/spearman": "With reward_model: correlation of their ranks.",
    "eval/reward_std": "Population standard deviation of the returns of the evaluated episodes.",
    "eval/kl": "KL to the reference on held-out prompts, as `kl/reference`; nats.",
    "eval/distinct_2": "Distinct token bigrams over all token bigrams in the held-out answers: 1 is no repetition at all.",
    "eval/length": "Written tokens per held-out answer.",
    "eval/end_rate": "Share of held-out answers that ended by themselves.",
}


@torch.no_grad()
def batch_metrics(batch: Batch) -> dict[str, float]:
    """What the rollout and the advantages say, before the update."""
    mask_BT = batch.mask_BT
    if batch.objective != "policy":
        return batch.metrics
    metrics = {}
    if batch.reference_logprobs_BT is not None:
        acted_B = mask_BT.any(1)  # rows in which the policy did nothing are not counted
        rows = acted_B.sum().clamp(min=1)
        per_token = k3(batch.logprobs_BT, batch.reference_logprobs_BT)
        metrics["kl/reference"] = float(sequence_kl(batch)[acted_B].sum() / rows)
        metrics["kl/reference_k3"] = float(torch.where(mask_BT, per_token, 0.0).sum() / rows)
    if batch.returns_BT is not None:
        metrics["critic/value_mean"] = float(masked_mean(batch.values_BT, mask_BT))
        metrics["critic/explained_variance"] = float(
            explained_variance(batch.values_BT, batch.returns_BT, mask_BT)
        )
        metrics["critic/return_mean"] = float(masked_mean(batch.returns_BT, mask_BT))
    if batch.groups_B is not None and len(groups := batch.groups_B.unique()) < len(batch):
        metrics["reward/zero_variance_groups"] = float(
            len(groups) - len(batch.groups_B[has_reward_variance(batch)].unique())
        )
    if batch.behaviour_logprobs_BT is not None:
        difference = torch.where(mask_BT, batch.logprobs_BT - batch.behaviour_logprobs_BT, 0.0).abs()
        metrics["sampler/mismatch_mean"] = float(difference.sum() / mask_BT.sum().clamp(min=1))
        metrics["sampler/mismatch_max"] = float(difference.max())
    return metrics | batch.metrics


def update_metrics(result: UpdateResult, *, learning_rate: float, skipped: int) -> dict[str, float]:
    """What the optimiser did; means over all minibatches seen. `skipped` are the run's skipped steps so far."""
    metrics = {
        "ppo/learning_rate": learning_rate,
        "ppo/stopped_early": float(result.stopped_early),
        "ppo/grad_norm": result.grad_norm,
        "ppo/skipped_steps": float(skipped),
    }
    if result.stats is not None:
        named = dict(zip(result.stats.NAMES, result.stats.sums.tolist(), strict=True))
        means = {name: value / max(named["steps"], 1.0) for name, value in named.items()}
        metrics |= {
            "ppo/policy_loss": means["policy_loss"],
            "ppo/approx_kl": means["approx_kl"],
            "ppo/clip_fraction": means["clipped"],
            "ppo/ratio_mean": means["ratio"],
            "ppo/ratio_max": float(result.stats.ratio_max),
            "policy/entropy": means["entropy"],
        }
        if result.has_critic:
            metrics |= {
                "critic/value_loss": means["value_loss"],
                "critic/clip_fraction": means["value_clipped"],
            }
        if (imitation := result.stats.imitation) is not None:
            metrics["ptx/loss"] = float(imitation.policy_loss / imitation.steps)
    return metrics


def measures_of(batch: Batch) -> Callable[..., dict[str, float]]:
    """Which of these functions measures an update on such a batch."""
    if batch.objective == "policy":
        return update_metrics
    return nll_metrics if batch.objective == "imitation" else preference_metrics


def preference_metrics(result: UpdateResult, *, learning_rate: float, skipped: int) -> dict[str, float]:
    """The same for preferences."""
    metrics = {
        "reward_model/learning_rate": learning_rate,
        "reward_model/grad_norm": result.grad_norm,
        "reward_model/skipped_steps": float(skipped),
    }
    if result.stats is not None:
        metrics["reward_model/loss"] = float(result.stats.policy_loss / result.stats.steps)
    return metrics


def nll_metrics(result: UpdateResult, *, learning_rate: float, skipped: int) -> dict[str, float]:
    """The same for demonstrations."""
    metrics = {
        "sft/learning_rate": learning_rate,
        "sft/grad_norm": result.grad_norm,
        "sft/skipped_steps": float(skipped),
    }
    if result.stats is not None:
        metrics["sft/nll"] = float(result.stats.policy_loss / result.stats.steps)
        metrics["policy/entropy"] = float(result.stats.entropy / result.stats.steps)
    return metrics

"""The metrics of an update: their names and meanings, and those of a batch before it."""

import torch

from surefoot.config import SUPERVISED
from surefoot.core.kl import k3
from surefoot.core.masked import explained_variance, masked_mean
from surefoot.rollout.batch import has_reward_variance
from surefoot.rollout.logprobs import sequence_kl
from surefoot.types import Batch

STEP_METRICS = ("grad_norm", "learning_rate", "skipped_steps")
# Name -> meaning. docs/metrics.md is written from this; a metric that is not here cannot be logged. Means
# over tokens are over those that the policy wrote, and with `sft` over the trained ones; nats.
METRICS = {
    "episodes": "Episodes so far in the run.",
    "timesteps": "Timesteps so far in the run, of all sub-environments together.",
    "examples": "With sft, reward_model and dpo: rows so far in the run, counted again in every epoch.",
    "reward/mean": "Mean reward of this update's episodes, before penalty, scaling and clipping.",
    "reward/std": "Population standard deviation of those rewards.",
    "reward/part/<label>": "With several rewards: mean of what that part gave, before its weight.",
    "reward/left_out": "Share of episodes that the reward was None for, if any; they are not trained on.",
    "reward/log/<name>": "What reward functions gave to `log_metric`, mean over their calls.",
    "reward/zero_variance_groups": "Groups of completions of one prompt whose rewards are all equal.",
    "reward/shaped": "Mean reward after penalty, scaling and clipping, before the KL penalty.",
    "kl/reference": "KL to the reference: log p - log p_ref summed over an episode; mean of the rewarded.",
    "kl/reference_k3": "The same by the k3 estimator, which is never negative and has less variance.",
    "kl/coef": "β, the weight of the KL penalty (`kl.placement` says where), as used in this update.",
    "ppo/policy_loss": "Clipped surrogate (or CISPO's) loss, mean over tokens and minibatches.",
    "ppo/approx_kl": "KL(old‖new) by k3, mean over tokens and minibatches; nats per token.",
    "ppo/clip_fraction": "Share of tokens whose ratio left [1 - ε, 1 + ε]; with cispo [0, 1 + ε].",
    "ppo/ratio_mean": "Mean of π_new / π_old over tokens and minibatches.",
    "ppo/ratio_max": "Largest π_new / π_old.",
    "ppo/masked_completions": "With ppo.mask_truncated: completions of this update left out of the loss.",
    "ppo/stopped_early": "1 if the trust region (ppo.target_kl) ended the update before its last epoch.",
    "ppo/grad_norm": "Gradient norm before clipping, mean over the steps taken.",
    "ppo/learning_rate": "Adam's step size in this update.",
    "ppo/skipped_steps": "Optimizer steps skipped so far, as loss or gradient was not finite.",
    "ptx/loss": "With ptx: negative log-likelihood of each minibatch's demonstrations; nats per token.",
    "ptx/coef": "With ptx: the weight of that loss in this update; 0 also while the critic warms up.",
    "sft/nll": "Negative log-likelihood of the trained tokens before the step; nats per token.",
    "sft/epoch": "Passes over the examples so far.",
    "reward_model/loss": "Loss before the step, mean over the rows: pairs: nats, ratings: ½ (r - rating)².",
    "reward_model/epoch": "Passes over the preferences so far.",
    "dpo/loss": "Loss before the step, mean over the pairs; nats.",
    "dpo/epoch": "Passes over the pairs so far.",
    "rewards/chosen": "With dpo: implicit reward β (log π - log π_ref) of the chosen completions, mean.",
    "rewards/rejected": "The same of the rejected ones.",
    "rewards/margins": "Their difference, which the loss widens.",
    "rewards/accuracies": "Share of pairs whose chosen completion has the higher one; ties count half.",
    "logps/chosen": "With dpo: log-prob of a chosen completion, summed over its tokens, mean; nats.",
    "logps/rejected": "The same of the rejected ones.",
    **{f"{kind}/{name}": f"As `ppo/{name}`." for kind in SUPERVISED for name in STEP_METRICS},
    "critic/value_loss": "½ (V - R)², clipped if asked for, mean over tokens and minibatches.",
    "critic/explained_variance": "1 - Var(R - V) / Var(R) before the update: 0 is no better than a constant.",
    "critic/clip_fraction": "Share of tokens whose value moved further than clip_range_vf.",
    "critic/value_mean": "Mean value before the update.",
    "critic/return_mean": "Mean TD(λ) return.",
    "policy/entropy": "Entropy of the distribution each token is drawn from, exact, mean over minibatches.",
    "length/mean": "Tokens per completion, end token included (with reward_model and dpo: of a whole text).",
    "length/end_rate": "Share of episodes that an end token or stop string ended, not the length limit.",
    "sampler/mismatch_mean": "Mean |log p_trainer - log p_sampler|, where the two differ (bfloat16).",
    "sampler/mismatch_max": "Largest such difference.",
    "time/rollout_s": "Seconds spent on the rollout.",
    "time/score_s": "Seconds spent on the reward function, and on reference and old log-probs.",
    "time/update_s": "Seconds spent on advantages and optimizer steps.",
    "throughput/tokens_per_s": "Tokens per second of these three (with pairs: of the longer texts).",
    "throughput/steps_per_s": "Timesteps per second of these three.",
    "rollout/ep_rew_mean": "Mean return of the last 100 finished episodes, as the environment paid it.",
    "rollout/ep_len_mean": "Mean length of those episodes, timesteps.",
    "selfplay/games": "With self-play: games finished in this update.",
    "selfplay/win_rate": "Mean result of the learner in those games: 1 won, ½ drawn or cut off, 0 lost.",
    "selfplay/elo": "The learner's Elo by its games against the opponent pool; the random player has 0.",
    "eval/reward": "Mean reward on held-out prompts; with env, mean return of the evaluated episodes.",
    "eval/reward_std": "Population standard deviation of those returns.",
    "eval/part/<label>": "With several rewards: mean of that part on held-out prompts, before its weight.",
    "eval/log/<name>": "As `reward/log/<name>`, on held-out prompts.",
    "eval/metric": "The task's metric, or eval/reward, -eval/nll or -eval/loss: what `best` is best by.",
    "eval/nll": "With sft: negative log-likelihood of the held-out trained tokens; nats per token.",
    "eval/perplexity": "e to the eval/nll: 1 is certainty, the vocabulary's size is knowing nothing.",
    "eval/ptx_perplexity": "With ptx: the same of the held-out demonstrations, at generation.temperature.",
    "eval/loss": "With reward_model and dpo: their loss on the held-out preferences.",
    "eval/margin": "With dpo: `rewards/margins` on the held-out pairs.",
    "eval/accuracy": "Share of pairs (of ratings: all unequal pairs) scored in their order; ties count half.",
    "eval/pearson": "With reward_model: correlation of scores and ratings on held-out texts.",
    "eval/spearman": "With reward_model: correlation of their ranks.",
    "eval/kl": "`kl/reference` on held-out prompts.",
    "eval/distinct_2": "Distinct token bigrams over all in the held-out completions: 1 is no repetition.",
    "eval/length": "Tokens per held-out completion; with env, timesteps per episode.",
    "eval/end_rate": "Share of held-out completions that ended by themselves.",
}


@torch.no_grad()
def batch_metrics(batch: Batch) -> dict[str, float]:
    """What rollout and advantages say, before the update."""
    mask_BT = batch.mask_BT
    metrics = {}
    if batch.reference_logprobs_BT is not None and bool(mask_BT.any()):
        rows = mask_BT.any(1).sum().clamp(min=1)
        per_token = k3(batch.logprobs_BT, batch.reference_logprobs_BT)
        metrics["kl/reference"] = mean_kl(batch)
        metrics["kl/reference_k3"] = float(torch.where(mask_BT, per_token, 0.0).sum() / rows)
    if batch.returns_BT is not None:
        values_BT, returns_BT = batch.values_BT, batch.returns_BT
        metrics["critic/value_mean"] = float(masked_mean(values_BT, mask_BT))
        metrics["critic/explained_variance"] = float(explained_variance(values_BT, returns_BT, mask_BT))
        metrics["critic/return_mean"] = float(masked_mean(returns_BT, mask_BT))
    if batch.groups_B is not None and len(groups := batch.groups_B.unique()) < len(batch):
        varying = len(batch.groups_B[has_reward_variance(batch)].unique())
        metrics["reward/zero_variance_groups"] = float(len(groups) - varying)
    if batch.behavior_logprobs_BT is not None:
        difference = torch.where(mask_BT, batch.logprobs_BT - batch.behavior_logprobs_BT, 0.0).abs()
        metrics["sampler/mismatch_mean"] = float(difference.sum() / mask_BT.sum().clamp(min=1))
        metrics["sampler/mismatch_max"] = float(difference.max())
    return metrics


def mean_kl(batch: Batch) -> float:
    """KL to the reference summed over a row's tokens, mean over the rows in which the policy acted; nats."""
    acted_B = batch.mask_BT.any(1)
    return float(sequence_kl(batch)[acted_B].sum() / acted_B.sum().clamp(min=1))

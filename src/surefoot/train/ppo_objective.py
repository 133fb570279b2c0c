"""PPO and its relatives (docs/family.md) as an objective: advantages, loss, metrics, gates."""

import functools
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surefoot.config import Config
from surefoot.core.advantages import gae, group_advantages
from surefoot.core.kl import adapted_kl_coef, kl_penalized_rewards
from surefoot.core.losses import LossSettings, PPOStats, ppo_loss, truncated_ratio
from surefoot.core.masked import whiten
from surefoot.data.batches import micro_batches
from surefoot.policies.base import Policy
from surefoot.rollout.batch import has_reward_variance
from surefoot.rollout.logprobs import sequence_kl
from surefoot.train.gates import check_first_minibatch, check_kl_sign, is_surely_negative
from surefoot.train.metrics import batch_metrics, mean_kl
from surefoot.train.objective import Accelerator, Moment, Objective, UpdateResult
from surefoot.types import Batch, Evaluation

# Metric -> the sum of `PPOStats` that it is the mean of.
MEANS = {
    **{"ppo/policy_loss": "policy_loss", "ppo/approx_kl": "approx_kl", "ppo/clip_fraction": "clipped"},
    **{"ppo/ratio_mean": "ratio", "policy/entropy": "entropy"},
    **{"critic/value_loss": "value_loss", "critic/clip_fraction": "value_clipped"},
}


def advantages(batch: Batch, config: Config | None = None) -> Batch:
    """Fill `advantages_BT` and `returns_BT`: KL into the rewards, whitening on request, then GAE.

    Without a critic (docs/family.md) there are no returns; the batch has what completions are compared with.
    """
    return PPOObjective(config).prepare(batch)


class PPOObjective(Objective):
    """The clipped surrogate, value loss, entropy bonus and KL penalty, as `config` sets them.

    Of `config` it reads `ppo`, `kl`, `group.skip_zero_variance`, `shaping.whiten`, `generation.tis_cap` and,
    of `policy.critic`, `gae_lambda` and `warmup_updates`.
    """

    name = "ppo"

    def __init__(self, config: Config | None = None, *, accelerator: Accelerator | None = None):
        self.config = config = config or Config()
        self.settings, self.n_epochs = config.ppo, config.ppo.n_epochs
        self.accelerator = accelerator
        # As the next update has them:
        self.clip_range, self.ent_coef = config.ppo.clip_range, config.ppo.ent_coef
        self.kl_coef = config.kl.coef
        self.negative_kl_in_a_row = 0  # updates whose KL to the reference was surely below 0
        self._normalizes = config.ppo.normalize_advantage and config.ppo.has_critic
        self._is_whitened = False

    def prepare(self, batch: Batch, moment: Moment | None = None) -> Batch:
        """See `advantages`."""
        ppo = self.config.ppo
        if moment is not None:
            self.clip_range = moment.value("clip_range", ppo.clip_range, ppo.clip_schedule)
            self.ent_coef = moment.value("ent_coef", ppo.ent_coef, ppo.ent_schedule)
        rewards_BT, mask_BT = batch.rewards_BT, batch.mask_BT
        if batch.reference_logprobs_BT is not None and self.config.kl.placement == "reward":
            logprobs = (batch.logprobs_BT, batch.reference_logprobs_BT)
            rewards_BT = kl_penalized_rewards(rewards_BT, *logprobs, mask_BT, coef=self.kl_coef)
        if self.config.shaping.whiten:
            rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
        if not ppo.has_critic:
            batch.advantages_BT, batch.returns_BT = self._without_critic(batch, rewards_BT), None
            return batch
        ends = {"mask_BT": mask_BT, "ends_BT": batch.ends_BT, "bootstrap_BT": batch.bootstrap_BT}
        estimate = functools.partial(gae, rewards_BT, batch.values_BT, **ends, gamma=ppo.gamma)
        batch.advantages_BT, batch.returns_BT = estimate(lam=ppo.gae_lambda)
        if (critic_lambda := self.config.policy.critic.gae_lambda) is not None:
            _, batch.returns_BT = estimate(lam=critic_lambda)
        return batch

    def _without_critic(self, batch: Batch, rewards_BT: Tensor) -> Tensor:
        """[B, T], 0 off the mask: whitened reward-to-go, or the completion's reward over a baseline."""
        kind, mask_BT = self.config.ppo.advantage, batch.mask_BT
        if kind == "reinforce_pp":
            # GAE with λ = 1 and values of 0 is the discounted sum of the rewards to come.
            zeros_BT = torch.zeros_like(rewards_BT)
            ends = {"mask_BT": mask_BT, "ends_BT": batch.ends_BT, "bootstrap_BT": zeros_BT}
            to_go_BT, _ = gae(rewards_BT, zeros_BT, **ends, gamma=self.config.ppo.gamma, lam=1.0)
            return whiten(to_go_BT, mask_BT)
        rewards_B = torch.where(mask_BT, rewards_BT, 0.0).sum(1)
        if kind == "remax":
            assert batch.baselines_B is not None, "collect the batch with advantage: remax"
            advantages_B = rewards_B - batch.baselines_B
        else:
            assert batch.groups_B is not None, "a batch without groups_B has no completions to compare"
            advantages_B = group_advantages(rewards_B, batch.groups_B, acted_B=mask_BT.any(1), kind=kind)
        return torch.where(mask_BT, advantages_B[:, None], 0.0)

    def select(self, batch: Batch, rows_per_minibatch: int) -> Batch:
        """Without rows that teach nothing, as no reward applies to them, nor, if asked for, zero-variance
        groups; whitened here where all is one minibatch. Of truncated completions the tokens are masked, if
        asked for: they go on counting as rows, and in their groups.
        """
        assert len(batch.advantages_BT) == len(batch), "call advantages(batch) first"
        skips = self.config.group.skip_zero_variance
        teaches_B = has_reward_variance(batch) if skips else batch.mask_BT.any(1)
        if not bool(teaches_B.all()):
            batch = batch.rows(teaches_B.nonzero().flatten())
        if self.config.ppo.mask_truncated and len(batch):
            batch = replace(batch, mask_BT=batch.mask_BT & ~batch.truncated_B[:, None])
            batch = batch if bool(batch.mask_BT.any()) else batch.rows(slice(0))
        self._is_whitened = self._normalizes and rows_per_minibatch >= len(batch) > 1
        if self._is_whitened:
            batch = replace(batch, advantages_BT=whiten(batch.advantages_BT, batch.mask_BT))
        return batch

    def gradient(self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> PPOStats:
        """Of the loss over the minibatch `rows`, divided by its tokens (or as `loss_aggregation` says)."""
        normalize = self._normalizes and not self._is_whitened
        settings = self._loss_settings(batch)
        if self.accelerator is not None:
            return self.accelerator.gradient(batch, settings, normalize, token_budget)
        batch = replace(batch, advantages_BT=self._minibatch_advantages(batch, rows, normalize))
        denominator, stats = self._denominator(batch, rows), []
        for micro in micro_batches(batch, rows, token_budget):
            part = batch if len(micro) == len(batch) else batch.rows(micro)
            scale: float | Tensor = 1.0 / denominator
            if self.config.ppo.loss_aggregation == "sequence":
                scale = part.mask_BT / part.mask_BT.sum(1).clamp(min=1)[:, None] * scale
            old = (part.logprobs_BT, part.values_BT)
            loss, sums = ppo_loss(
                self._trained(policy.evaluate(part, entropy_gradient=self.ent_coef > 0), part),
                old if part.reference_logprobs_BT is None else (*old, part.reference_logprobs_BT),
                advantages_BT=part.advantages_BT,
                # Without a critic its values are their own target: no loss.
                returns_BT=part.values_BT if part.returns_BT is None else part.returns_BT,
                mask_BT=part.mask_BT,
                scale=scale,
                settings=settings,
            )
            loss.backward()
            stats.append(sums)
        return functools.reduce(operator.add, stats)

    def _trained(self, new: Evaluation, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, values, entropies; what is not trained has no gradient: the optimizer skips it."""
        if not self.config.ppo.has_critic:
            return new.logprobs_BT, batch.values_BT, new.entropies_BT
        if batch.version < self.config.policy.critic.warmup_updates:
            return new.logprobs_BT.detach(), new.values_BT, new.entropies_BT.detach()
        return new.logprobs_BT, new.values_BT, new.entropies_BT

    def _minibatch_advantages(self, batch: Batch, rows: Tensor, normalize: bool) -> Tensor:
        """Advantages [B, T] as the loss of the minibatch `rows` counts them."""
        advantages_BT, mask_BT = batch.advantages_BT, batch.mask_BT
        if normalize and int(mask_BT[rows].sum()) > 1:  # one advantage alone has no spread to divide by
            # Over the minibatch, before it is split: a micro-batch's own mean would change the gradient.
            if len(rows) == len(batch):  # in the batch's order, whatever that of `rows`
                advantages_BT = whiten(advantages_BT, mask_BT)
            else:
                whitened_BT = torch.zeros_like(advantages_BT)
                whitened_BT[rows] = whiten(advantages_BT[rows], mask_BT[rows])
                advantages_BT = whitened_BT
        cap = self.config.generation.tis_cap
        if cap is not None and batch.behavior_logprobs_BT is not None:
            # The clipped loss is proportional to the advantage: a weight of one is a weight of the other.
            weight_BT = truncated_ratio(batch.logprobs_BT, batch.behavior_logprobs_BT, cap=cap)
            advantages_BT = advantages_BT * weight_BT
        return advantages_BT

    def _denominator(self, batch: Batch, rows: Tensor) -> int:
        """What the sum over `rows` is divided by: tokens, completions, or completions × `step_limit`."""
        tokens_B = batch.mask_BT.sum(1)[rows]
        if self.config.ppo.loss_aggregation == "token":
            return max(int(tokens_B.sum()), 1)
        counts_B = tokens_B > 0
        if self.config.ppo.mask_truncated:
            counts_B = counts_B | batch.truncated_B[rows]
        completions = max(int(counts_B.sum()), 1)
        if self.config.ppo.loss_aggregation == "sequence":
            return completions
        assert batch.step_limit is not None, "loss_aggregation: constant needs the batch's step_limit"
        return completions * batch.step_limit

    def _loss_settings(self, batch: Batch) -> LossSettings:
        ppo, kl = self.config.ppo, self.config.kl
        beta = self.kl_coef if kl.placement == "loss" and batch.reference_logprobs_BT is not None else 0.0
        vf_coef = ppo.vf_coef * (2.0 if ppo.value_loss == "squared" else 1.0)  # of ½ (V - R)²
        clips = (ppo.clip_range_high, ppo.dual_clip, beta)
        kinds = (ppo.policy_loss == "cispo", ppo.importance_sampling_level == "sequence")
        return LossSettings(self.clip_range, ppo.clip_range_vf, vf_coef, self.ent_coef, *clips, *kinds)

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """Of the batch before the update, and means over all minibatches seen."""
        metrics = batch_metrics(batch)
        metrics |= {"kl/coef": self.kl_coef, "ppo/stopped_early": float(result.stopped_early)}
        if self.config.ppo.mask_truncated:
            metrics["ppo/masked_completions"] = float(batch.truncated_B.sum())
        if result.stats is None:
            return metrics
        metrics["ppo/ratio_max"] = float(result.stats.ratio_max)
        tokens = max(float(result.stats.num_tokens), 1.0)
        for name, field in MEANS.items():
            if self.config.ppo.has_critic or not name.startswith("critic/"):
                metrics[name] = float(getattr(result.stats, field)) / tokens
        return metrics

    def gates(self, stats: PPOStats, *, is_first: bool, exact: bool) -> bool:
        """The first ratio must be 1; `target_kl` ends an update before a step that is past it."""
        if not float(stats.num_tokens):  # all of it is masked: nothing to judge
            return True
        if is_first:
            check_first_minibatch(stats, exact=exact, clip_range=self.clip_range)
        target_kl = self.config.ppo.target_kl
        return target_kl is None or not float(stats.approx_kl / stats.num_tokens) > target_kl

    def finish(self, batch: Batch) -> None:
        """Move β towards `kl.target`. Raises GateError once the KL was surely negative in three updates."""
        acted_B = batch.mask_BT.any(1)  # no reward applies to the others: they say nothing
        kl, kls_B = self.config.kl, sequence_kl(batch)[acted_B]
        is_negative = is_surely_negative(kls_B.tolist())
        self.negative_kl_in_a_row = self.negative_kl_in_a_row + 1 if is_negative else 0
        # While the critic warms up the policy stands still.
        is_due = len(kls_B) and batch.version >= self.config.policy.critic.warmup_updates
        if kl.target is not None and is_due:
            bounds = {"target": kl.target, "horizon": kl.horizon}
            self.kl_coef = adapted_kl_coef(self.kl_coef, mean_kl(batch), **bounds, episodes=len(kls_B))
        check_kl_sign(self.negative_kl_in_a_row)

    def state(self) -> dict[str, Any]:
        """β and the count of negative KLs."""
        return {"kl_coef": self.kl_coef, "negative_kl_in_a_row": self.negative_kl_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.kl_coef = float(state["kl_coef"])
        self.negative_kl_in_a_row = int(state["negative_kl_in_a_row"])

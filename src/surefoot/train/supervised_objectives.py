"""Objectives on data: likelihood of demonstrations, preferences and ratings; and their sum with PPO."""

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surefoot.config import Config, DPOConfig, RewardModelConfig, SFTConfig
from surefoot.core.losses import LossStats, PPOStats, nll_loss
from surefoot.core.preference import preference_loss, share_of_pairs_in_order
from surefoot.data.batches import micro_batches
from surefoot.policies.base import Policy
from surefoot.rollout.demonstrations import DemonstrationRollout
from surefoot.rollout.logprobs import pair_logprobs
from surefoot.train.objective import Moment, Objective, OptimizerSettings, UpdateResult
from surefoot.train.ppo_objective import PPOObjective
from surefoot.types import Batch, Poll

PairLoss = Callable[[Tensor, Tensor], Tensor]
PolicyLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NLLObjective(Objective):
    """Negative log-likelihood (cross-entropy) of demonstrations, mean over their trained tokens."""

    name = "sft"

    def __init__(self, settings: SFTConfig | None = None):
        self.settings = settings or SFTConfig()

    def gradient(
        self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int, coef: float = 1.0
    ) -> LossStats:
        """Of `coef` times the loss."""
        denominator, stats = max(int(batch.mask_BT[rows].sum()), 1), []
        for micro in micro_batches(batch, rows, token_budget):
            part = batch.rows(micro)
            new = policy.evaluate(part)
            total, sums = nll_loss(new.logprobs_BT, new.entropies_BT, part.mask_BT)
            (coef * (total / denominator)).backward()
            stats.append(sums)
        return functools.reduce(operator.add, stats)

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """Means over the trained tokens."""
        if (stats := result.stats) is None:
            return {}
        return {"sft/nll": stats.mean, "policy/entropy": float(stats.entropy / stats.num_tokens)}


class PreferenceObjective(Objective):
    """A reward model's `loss` (scores [B, K], labels [B]) -> [B], mean over preferences or ratings."""

    name = "reward_model"

    def __init__(self, loss: PairLoss = preference_loss, settings: RewardModelConfig | None = None):
        self.loss, self.settings = loss, settings or RewardModelConfig()

    def gradient(self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> LossStats:
        """A row's texts stay together, so that of two texts a row half as many rows fit."""
        stats, sides = [], batch.observations["lengths"].shape[1]
        for micro in micro_batches(batch, rows, token_budget // sides):
            part = batch.rows(micro)
            losses_B = self.loss(policy.evaluate(part).values_BT, part.labels_B)
            (losses_B.sum() / len(rows)).backward()
            stats.append(LossStats(losses_B.detach().sum().float(), len(losses_B)))
        return functools.reduce(operator.add, stats)

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """Mean over the rows."""
        return {} if result.stats is None else {"reward_model/loss": result.stats.mean}


class DPOObjective(Objective):
    """DPO's `loss` (log-probs and the reference's, [B, 2]) -> [B] and rewards [B, 2], mean over pairs."""

    name = "dpo"

    def __init__(self, loss: PolicyLoss, settings: DPOConfig | None = None):
        self.loss, self.settings = loss, settings or DPOConfig()

    def gradient(self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> LossStats:
        """The two texts of a pair stay together."""
        stats = []
        for micro in micro_batches(batch, rows, token_budget // 2):
            part = batch.rows(micro)
            logprobs_B2 = pair_logprobs(lambda texts: policy.evaluate(texts).logprobs_BT, part)
            losses_B, rewards_B2 = self.loss(logprobs_B2, part.reference_B2)
            (losses_B.sum() / len(rows)).backward()
            sums = (rewards_B2.detach().sum(0), logprobs_B2.detach().sum(0))
            in_order = len(micro) * share_of_pairs_in_order(rewards_B2.detach())
            stats.append(LossStats(losses_B.detach().sum(), len(losses_B), 0.0, *sums, in_order))
        return functools.reduce(operator.add, stats)

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """Means over the pairs."""
        if (stats := result.stats) is None:
            return {}
        both = (stats.rewards / stats.num_tokens, stats.logprobs / stats.num_tokens)
        (chosen, rejected), (chosen_logprob, rejected_logprob) = (means.tolist() for means in both)
        return {
            "dpo/loss": stats.mean,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": stats.in_order / stats.num_tokens,
            "logps/chosen": chosen_logprob,
            "logps/rejected": rejected_logprob,
        }


class SumObjective:
    """PPO + coef · negative log-likelihood of demonstrations: PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155).

    To each minibatch's loss come the next demonstrations, one step for both. Which those are follows from the
    seed and how many were taken before, the one counter to save. While the critic alone learns none are.
    """

    name = "ppo"

    def __init__(self, config: Config, demonstrations: DemonstrationRollout):
        assert config.ptx is not None
        self.ppo = PPOObjective(config)
        self.settings: OptimizerSettings = config.ppo
        self.n_epochs, self.accelerator = self.ppo.n_epochs, self.ppo.accelerator
        self.select, self.gates, self.finish = self.ppo.select, self.ppo.gates, self.ppo.finish
        self.demonstrations, self.notice = demonstrations, demonstrations.notice
        self.inputs = demonstrations.inputs
        self.ptx, self.coef = config.ptx, config.ptx.coef  # the second as the next update has it
        self.taken = 0  # demonstrations, counted again in every epoch

    def prepare(self, batch: Batch, moment: Moment | None = None) -> Batch:
        """PPO's."""
        if moment is not None:
            self.coef = moment.value("ptx", self.ptx.coef, self.ptx.schedule)
        return self.ppo.prepare(batch, moment)

    def gradient(self, policy: Policy, batch: Batch, rows: Tensor, *, token_budget: int) -> PPOStats:
        """Of both. If memory runs out in the middle, the same demonstrations are taken again."""
        ppo = self.ppo.gradient(policy, batch, rows, token_budget=token_budget)
        if not (coef := self._coef_for(batch)):
            return ppo
        examples = self.demonstrations.collect(first=self.taken, count=self.demonstrations.per_update)
        everything, nll = torch.arange(len(examples)), NLLObjective()
        sums = nll.gradient(policy, examples, everything, token_budget=token_budget, coef=coef)
        self.taken += self.demonstrations.per_update
        return replace(ppo, nll=sums.loss, nll_tokens=sums.num_tokens)

    def _coef_for(self, batch: Batch) -> float:
        return self.coef if batch.version >= self.ppo.config.policy.critic.warmup_updates else 0.0

    def metrics(self, batch: Batch, result: UpdateResult) -> dict[str, float]:
        """PPO's, and the demonstrations' loss and weight."""
        metrics = self.ppo.metrics(batch, result) | {"ptx/coef": self._coef_for(batch)}
        if (stats := result.stats) is not None and stats.nll_tokens:
            metrics["ptx/loss"] = float(stats.nll / stats.nll_tokens)
        return metrics

    def evaluate(self, examples: int, *, poll: Poll = None) -> dict[str, float]:
        """The perplexity of the first `examples` held-out demonstrations, if there are any."""
        if not self.demonstrations.can_evaluate:
            return {}
        likelihood, _ = self.demonstrations.evaluate(examples, poll=poll)
        return {"eval/ptx_perplexity": likelihood["eval/perplexity"]}

    def state(self) -> dict[str, Any]:
        """PPO's, and the counter."""
        return {"ppo": self.ppo.state(), "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.ppo.restore(state["ppo"])
        self.taken = int(state["taken"])

"""Preferences -> batches for a reward model, its evaluation on held-out preferences, and its calibration."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from surefoot.config import RewardModelConfig
from surefoot.core import preference as core
from surefoot.data.batches import Texts, preference_batch
from surefoot.data.preferences import PreferenceDataset
from surefoot.policies.base import Policy
from surefoot.rollout.base import Evaluated, ExampleRollout
from surefoot.types import Batch, Poll, Preference


class Scorer(Policy, Protocol):
    """A policy that scores texts: what `policies/lm/reward_model.py` provides."""

    shift: float  # of a score, and what it is divided by, to be a reward
    scale: float

    def encode(self, prompt: Any, text: str, *, where: str) -> tuple[int, ...]:
        """Tokens of a prompt and what continues it. Raises InputError, naming `where`, if too long."""

    def scores(self, rows: Sequence[Texts], poll: Poll = None) -> torch.Tensor:
        """Scores of rows of K tokenized texts each, [B, K] float32 on the CPU."""


class PreferenceRollout(ExampleRollout):
    """Preferences. Raises InputError for a text that does not fit.

    Ratings are standardized by their mean and standard deviation over the training rows: how fast the head
    learns does not depend on the raters' scale.
    """

    def __init__(self, policy: Scorer, data: PreferenceDataset, settings: RewardModelConfig, seed: int):
        self.policy, self.of_pairs = policy, data.of_pairs
        self._train, self._held_out = (
            [[policy.encode(row.prompt, text, where=row.where) for text in row.texts] for row in part]
            for part in (data.train, data.held_out)
        )
        self.loss, self._mean, self._std = core.rating_loss, 0.0, 1.0
        if data.of_pairs:
            self.loss = functools.partial(core.preference_loss, center=settings.center)
        else:
            ratings = torch.tensor([row.label for row in data.train], dtype=torch.float64)
            self._mean, self._std = float(ratings.mean()), float(ratings.std(correction=0))
        parts = ((self._train, data.train), (self._held_out, data.held_out))
        seen = ((tokens, row.label) for part in parts for tokens, row in zip(*part, strict=True))
        self._begin(data, seen, batch_size=settings.batch_size, seed=seed, key="reward_model")

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """Loss on the first `episodes` held-out preferences, and how far the scores agree with them."""
        preferences = self.data.held_out[:episodes]
        scores_BK = self.policy.scores(self._held_out[:episodes], poll)
        labels_B = torch.tensor(self._labels(preferences), dtype=torch.float32)
        loss = float(self.loss(scores_BK, labels_B).mean())
        metrics = {"eval/loss": loss, "eval/metric": -loss}
        if self.of_pairs:
            metrics["eval/accuracy"] = core.share_of_pairs_in_order(scores_BK)
        else:
            agreement = {"accuracy": core.share_in_order, "pearson": core.pearson, "spearman": core.spearman}
            metrics |= {f"eval/{name}": of(scores_BK[:, 0], labels_B) for name, of in agreement.items()}
        scored = zip(preferences, scores_BK.tolist(), strict=True)
        return metrics, [replace(preference, scores=tuple(scores)) for preference, scores in scored]

    def calibrate(self) -> dict[str, Any]:
        """Set the policy's `shift` and `scale`: the held-out texts' rewards then have mean 0 and std 1.

        With fewer than two held-out preferences the training ones take their place. Returns, as JSON, how
        well what the model predicts of these preferences is calibrated: docs/reward-model.md.
        """
        is_held_out = len(self._held_out) > 1
        rows, preferences = self._train, self.data.train
        if is_held_out:
            rows, preferences = self._held_out, self.data.held_out
        scores_BK = self.policy.scores(rows).double()
        self.policy.shift = float(scores_BK.mean())
        self.policy.scale = float(scores_BK.std(correction=0)) or 1.0
        if self.of_pairs:
            differences_B = scores_BK[:, 0] - scores_BK[:, 1]
            predicted_B, observed_B = differences_B.abs().sigmoid(), 0.5 + 0.5 * differences_B.sign()
        else:
            predicted_B = self._mean + self._std * scores_BK[:, 0]
            observed_B = torch.tensor([row.label for row in preferences], dtype=torch.float64)
        bins, error = core.reliability(predicted_B, observed_B)
        kind = {"kind": "pairs" if self.of_pairs else "ratings"}
        texts = {"texts": "held-out" if is_held_out else "training"}
        return {**kind, **texts, "calibration_error": error, "bins": bins}

    def _training_batch(self, indices: list[int]) -> tuple[Batch, float]:
        labels = self._labels([self.data.train[index] for index in indices])
        rows = [self._train[index] for index in indices]
        batch = preference_batch(rows, labels, device=self.policy.device)
        return batch, float(batch.observations["lengths"].float().mean())

    def _labels(self, preferences: Sequence[Preference]) -> list[float]:
        return [(preference.label - self._mean) / self._std for preference in preferences]

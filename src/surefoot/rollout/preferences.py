"""Judged texts -> batches for a reward model; and the reward model as the reward of a task."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from surefoot.config import RewardModelConfig
from surefoot.core.preference import (
    pearson,
    preference_loss,
    rating_loss,
    reliability,
    share_in_order,
    spearman,
)
from surefoot.data.batches import micro_batches, preference_batch
from surefoot.data.preferences import PreferenceDataset
from surefoot.data.render import encode_scored_text
from surefoot.errors import InputError
from surefoot.policies.base import Policy
from surefoot.types import Batch, Preference

SCORED_TOKENS = 4096  # at once, where nothing is trained


class ScoringPolicy(Policy, Protocol):
    """A policy that scores texts: what `policies/lm/reward_model.py` provides."""

    tokenizer: Any
    context_length: int
    model_end_tokens: frozenset[int]
    shift: float
    scale: float


class PreferenceRollout:
    """Takes a run's batches from preferences, one after the other through shuffled epochs.

    Ratings are standardized by their mean and standard deviation over the training examples: how fast the head learns does
    not depend on the raters' scale. Raises InputError for a text that does not fit, or if the data is another than a
    checkpoint's.
    """

    unit = "examples"
    throughput = "throughput/tokens_per_s"
    notice, latest = "", None

    def __init__(
        self, policy: ScoringPolicy, data: PreferenceDataset, *, settings: RewardModelConfig, seed: int
    ):
        self.policy, self.data, self.settings, self.seed = policy, data, settings, seed
        self._train = [_encoded(policy, preference) for preference in data.train]
        self._held_out = [_encoded(policy, preference) for preference in data.held_out]
        self._objective = (
            functools.partial(preference_loss, center=settings.center) if data.of_pairs else rating_loss
        )
        self._mean, self._deviation = 0.0, 1.0
        if not data.of_pairs:
            ratings = torch.tensor([preference.label for preference in data.train], dtype=torch.float64)
            self._mean, self._deviation = float(ratings.mean()), float(ratings.std(correction=0))
        seen = repr(
            [(tokens, preference.label) for tokens, preference in zip(self._train, data.train, strict=True)]
        )
        self._digest = hashlib.sha256(seen.encode()).hexdigest()

    @property
    def per_update(self) -> int:
        """Examples in one update."""
        return min(self.settings.batch_size, len(self._train))

    def collect(
        self, *, first: int, count: int, version: int = 0, poll: Callable[[], None] | None = None
    ) -> Batch:
        """PreferenceDataset number `first` to `first + count` of the run."""
        started = time.perf_counter()
        indices = [self.data.training_index(number, self.seed) for number in range(first, first + count)]
        batch = self._batch(
            [self._train[index] for index in indices], [self.data.train[index] for index in indices]
        )
        batch.version = version
        batch.metrics = {
            "reward_model/epoch": (first + count) / len(self._train),
            "length/mean": float(batch.observations["lengths"].float().mean()),
            "time/rollout_s": time.perf_counter() - started,
            "time/score_s": 0.0,
        }
        return batch

    def evaluate(
        self, episodes: int, *, poll: Callable[[], None] | None = None
    ) -> tuple[dict[str, float], list[Preference]]:
        """Loss on the first `episodes` held-out preferences, and how far the scores agree with them."""
        preferences = self.data.held_out[:episodes]
        batch = self._batch(self._held_out[:episodes], preferences)
        scores_BK = _scores(self.policy, batch, poll)
        assert batch.labels_B is not None
        labels_B = batch.labels_B.cpu()
        loss = float(self._objective(scores_BK, labels_B).mean())
        metrics = {"eval/loss": loss, "eval/metric": -loss}
        if self.data.of_pairs:
            metrics["eval/accuracy"] = float((0.5 + 0.5 * (scores_BK[:, 0] - scores_BK[:, 1]).sign()).mean())
        else:
            scores_B = scores_BK[:, 0]
            metrics["eval/accuracy"] = share_in_order(scores_B, labels_B)
            metrics |= {
                "eval/pearson": pearson(scores_B, labels_B),
                "eval/spearman": spearman(scores_B, labels_B),
            }
        shown = zip(preferences, scores_BK.tolist(), strict=True)
        return metrics, [replace(preference, scores=tuple(scores)) for preference, scores in shown]

    @property
    def can_evaluate(self) -> bool:
        """Whether preferences were held out."""
        return bool(self._held_out)

    def calibrate(self) -> dict[str, Any]:
        """Set the policy's `shift` and `scale`: the held-out texts (without any, the others) get mean 0, standard deviation 1.

        Returns, as JSON, how far what the model predicts of these texts is what people said: docs/reward-model.md.
        """
        texts, preferences = (
            (self._held_out, self.data.held_out) if self._held_out else (self._train, self.data.train)
        )
        scores_BK = _scores(self.policy, self._batch(texts, preferences)).double()
        self.policy.shift = float(scores_BK.mean())
        self.policy.scale = float(scores_BK.std(correction=0)) or 1.0
        if self.data.of_pairs:
            differences_B = scores_BK[:, 0] - scores_BK[:, 1]
            kind, predicted_B = "pairs", differences_B.abs().sigmoid()
            observed_B = 0.5 + 0.5 * differences_B.sign()
        else:
            kind, predicted_B = "ratings", self._mean + self._deviation * scores_BK[:, 0]
            observed_B = torch.tensor([preference.label for preference in preferences], dtype=torch.float64)
        bins, error = reliability(predicted_B, observed_B)
        return {
            "kind": kind,
            "texts": "held-out" if self._held_out else "training",
            "calibration_error": error,
            "bins": bins,
        }

    def start_over(self) -> None:
        """No environment is stepped here."""

    def state(self) -> dict[str, Any]:
        """All that is random follows from counters; what the preferences were is kept to be compared."""
        return {"examples": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`. Raises InputError for other preferences than it was trained on."""
        if state["examples"] != self._digest:
            raise InputError(
                "reward_model.data: these are not the preferences that the run was begun with; go on with the same ones"
            )

    def _batch(self, rows: Sequence[Sequence[Sequence[int]]], preferences: Sequence[Preference]) -> Batch:
        labels = [(preference.label - self._mean) / self._deviation for preference in preferences]
        return preference_batch(rows, labels, objective=self._objective, device=self.policy.device)


class RewardScorer:
    """A reward model in TRL's signature: `scorer(prompts=[…], completions=[…]) -> list[float]`.

    What goes in is text, so policy and reward model may have different tokenizers. Prompts and completions are strings, which
    are read as one text, or message lists, which go through the reward model's own chat template.
    """

    def __init__(self, policy: ScoringPolicy):
        self.policy = policy

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Calibrated scores, one a completion. Raises InputError for a text that does not fit the model's context."""
        if isinstance(prompts, str) or isinstance(completions, str):
            raise InputError(
                "score: prompts and completions are lists, one entry each; for one text write [prompt] and [text]"
            )
        if len(prompts) != len(completions):
            raise InputError(
                f"score: {len(prompts)} prompts and {len(completions)} completions; one prompt each is needed"
            )
        if not completions:
            return []
        texts = [
            c if isinstance(c, str) else "".join(str(message["content"]) for message in c)
            for c in completions
        ]
        rows = [
            [_tokens(self.policy, prompt, text, f"reward model: text {number}")]
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1)
        ]
        batch = preference_batch(rows, [0.0] * len(rows), objective=rating_loss, device=self.policy.device)
        scores_N = _scores(self.policy, batch)[:, 0].double()
        return ((scores_N - self.policy.shift) / self.policy.scale).tolist()


@torch.no_grad()
def _scores(policy: ScoringPolicy, batch: Batch, poll: Callable[[], None] | None = None) -> Tensor:
    """Scores of all texts, [B, K] float32 on the CPU, before calibration."""
    sides = batch.observations["lengths"].shape[1]
    scores_BK = torch.zeros(len(batch), sides)
    for rows in micro_batches(batch, torch.arange(len(batch)), SCORED_TOKENS // sides):
        if poll is not None:
            poll()
        scores_BK[rows] = policy.evaluate(batch.rows(rows)).values_BT.float().cpu()
    return scores_BK


def _encoded(policy: ScoringPolicy, preference: Preference) -> list[tuple[int, ...]]:
    return [_tokens(policy, preference.prompt, text, preference.where) for text in preference.texts]


def _tokens(policy: ScoringPolicy, prompt: Any, text: str, where: str) -> tuple[int, ...]:
    """Prompt and answer as the tokens of one text, and an end token: where the score is read, the text is over."""
    tokens = encode_scored_text(
        policy.tokenizer, prompt, text, end_tokens=policy.model_end_tokens, where=where
    )
    if len(tokens) > policy.context_length:
        raise InputError(
            f"{where}: has {len(tokens)} tokens, more than the model's context of {policy.context_length}; shorten it"
        )
    return tokens

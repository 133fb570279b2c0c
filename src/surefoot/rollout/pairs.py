"""Pairs of completions -> batches for DPO, and its loss on those held out."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surefoot.config import DPOConfig
from surefoot.core.preference import dpo_loss, share_of_pairs_in_order
from surefoot.data.batches import micro_batches, preference_batch
from surefoot.data.preferences import PreferenceDataset
from surefoot.data.render import TokenizedExample, encode_demonstration
from surefoot.errors import InputError
from surefoot.rollout.base import Evaluated, ExampleRollout
from surefoot.rollout.logprobs import Logprobs, pair_logprobs
from surefoot.rollout.text import LanguagePolicy
from surefoot.types import Batch, Demonstration, Poll, Preference

Pair = list[TokenizedExample]  # the chosen side first
AT_ONCE = 256  # pairs padded together


class PairRollout(ExampleRollout):
    """Pairs of completions. Raises InputError for a text that does not fit the model.

    The reference's log-probs are computed once, when they are first needed, in the order of the rows: they
    are the same whatever was trained before, and after a resume.
    """

    def __init__(self, policy: LanguagePolicy, data: PreferenceDataset, settings: DPOConfig, seed: int):
        self.policy, self._budget = policy, settings.micro_batch_tokens // 2
        smoothing = settings.label_smoothing
        self.loss = functools.partial(dpo_loss, beta=settings.beta, label_smoothing=smoothing)
        self._train = [self._tokenized(row) for row in data.train]
        self._held_out = [self._tokenized(row) for row in data.held_out]
        self._references: dict[str, Tensor] = {}  # [N, 2] on the CPU
        rows = (*self._train, *self._held_out)
        seen = ([(text.tokens, text.loss_mask) for text in row] for row in rows)
        self._begin(data, seen, batch_size=settings.batch_size, seed=seed, key="dpo")

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """See `ExampleRollout.collect`."""
        self._reference("train", self._train, poll)  # may take a while: what `poll` raises gives it up
        return super().collect(first=first, count=count, version=version, poll=poll)

    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """Loss on the first `episodes` held-out pairs, and what their implicit rewards say of them."""
        rows = self._held_out[:episodes]
        logprobs_B2 = self._logprobs(lambda texts: self.policy.evaluate(texts).logprobs_BT, rows, poll)
        losses_B, rewards_B2 = self.loss(logprobs_B2, self._reference("held_out", rows, poll))
        loss, accuracy = float(losses_B.mean()), share_of_pairs_in_order(rewards_B2)
        margin = float((rewards_B2[:, 0] - rewards_B2[:, 1]).mean())
        metrics = {"eval/loss": loss, "eval/metric": -loss, "eval/accuracy": accuracy, "eval/margin": margin}
        scored = zip(self.data.held_out, rewards_B2.tolist(), strict=False)  # the first of them
        return metrics, [replace(preference, scores=tuple(rewards)) for preference, rewards in scored]

    def _training_batch(self, indices: list[int]) -> tuple[Batch, float]:
        batch = self._batch([self._train[index] for index in indices])
        batch.reference_B2 = self._references["train"][indices].to(self.policy.device)
        return batch, float(batch.observations["lengths"].float().mean())

    def _reference(self, part: str, rows: Sequence[Pair], poll: Poll) -> Tensor:
        if len(self._references.get(part, ())) != len(rows):
            self._references[part] = self._logprobs(self.policy.reference_logprobs, rows, poll)
        return self._references[part]

    @torch.no_grad()
    def _logprobs(self, logprobs: Logprobs, rows: Sequence[Pair], poll: Poll) -> Tensor:
        """Of the completions of `rows`, [N, 2] float32 on the CPU."""
        found = []
        for start in range(0, len(rows), AT_ONCE):
            batch = self._batch(rows[start : start + AT_ONCE])
            found_B2 = torch.zeros(len(batch), 2)
            for part in micro_batches(batch, torch.arange(len(batch)), self._budget):
                if poll is not None:
                    poll()
                found_B2[part] = pair_logprobs(logprobs, batch.rows(part)).cpu()
            found.append(found_B2)
        return torch.cat(found)

    def _batch(self, rows: Sequence[Pair]) -> Batch:
        batch = preference_batch([[text.tokens for text in row] for row in rows], device=self.policy.device)
        starts = [[text.loss_mask.index(True) for text in row] for row in rows]
        batch.observations["starts"] = torch.tensor(starts, device=self.policy.device)
        return batch

    def _tokenized(self, preference: Preference) -> Pair:
        """Chosen and rejected, each after the prompt. Raises InputError for more tokens than the context."""
        policy, where, prompt = self.policy, preference.where, preference.prompt
        options: dict[str, Any] = {"end_tokens": policy.model_end_tokens, "mask_history": True}
        pair, context = [], policy.context_length
        for text in preference.texts:
            contents = {"text": text} if prompt is None else {"prompt": prompt, "completion": text}
            if isinstance(prompt, list):
                contents = {"messages": [*prompt, {"role": "assistant", "content": text}]}
            pair.append(encode_demonstration(policy.tokenizer, Demonstration(where, contents), **options))
            if (count := len(pair[-1].tokens)) > context:
                found = f"{where}: has {count} tokens, more than the model's context of {context}"
                raise InputError(f"{found}; shorten it")
        return pair

"""Demonstrations -> batches for supervised fine-tuning, and the likelihood of those held out."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from surefoot.config import SFTConfig
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.render import TokenizedExample, encode_demonstration
from surefoot.errors import InputError
from surefoot.rollout.base import Evaluated, ExampleRollout
from surefoot.rollout.text import LanguagePolicy
from surefoot.types import Batch, Demonstration, Poll


class DemonstrationRollout(ExampleRollout):
    """Demonstrations, cut to `sft.max_tokens`. Raises InputError for one that does not fit.

    `key` is the section of `sft`'s fields, for errors.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        data: Demonstrations,
        *,
        sft: SFTConfig,
        seed: int,
        key: str = "sft",
        temperature: float = 1.0,
    ):
        cut, self._max_tokens = f"{key}.max_tokens", sft.max_tokens or policy.context_length
        if self._max_tokens > policy.context_length:
            context = f"the model's context of {policy.context_length} tokens"
            raise InputError(f"{cut} ({sft.max_tokens}) is more than {context}; lower it")
        self.policy, self.sft, self.key, self.temperature, self._truncated = policy, sft, key, temperature, 0
        self._train, self._held_out = (
            [self._tokenized(example) for example in part] for part in (data.train, data.held_out)
        )
        if self._truncated:
            total = len(data.train) + len(data.held_out)
            self.notice = f"{self._truncated} of {total} examples are cut to {cut} ({sft.max_tokens})"
        seen = ((example.tokens, example.loss_mask) for example in (*self._train, *self._held_out))
        self._begin(data, seen, batch_size=sft.batch_size, seed=seed, key=key)

    @torch.no_grad()
    def evaluate(self, episodes: int, *, version: int = 0, poll: Poll = None) -> Evaluated:
        """NLL and perplexity of the first `episodes` held-out demonstrations, over all their tokens."""
        batch = self._batch(self._held_out[:episodes])
        nlls, tokens = [0.0] * len(batch), batch.mask_BT.sum(1).tolist()
        for rows in micro_batches(batch, torch.arange(len(batch)), self.sft.micro_batch_tokens):
            if poll is not None:
                poll()
            part = batch.rows(rows)
            logprobs_BT = self.policy.evaluate(part).logprobs_BT
            for row, logprobs, mask in zip(rows.tolist(), logprobs_BT, part.mask_BT, strict=True):
                nlls[row] = -float(logprobs[mask].double().sum())
        nll = sum(nlls) / sum(tokens)
        metrics = {"eval/nll": nll, "eval/perplexity": math.exp(min(nll, 700.0)), "eval/metric": -nll}
        measured = zip(self.data.held_out, nlls, tokens, strict=False)  # the first of them
        return metrics, [replace(example, nll=total / count) for example, total, count in measured]

    def _training_batch(self, indices: list[int]) -> tuple[Batch, float]:
        batch = self._batch([self._train[index] for index in indices])
        return batch, float(batch.mask_BT.sum()) / len(batch)

    def _batch(self, examples: Sequence[TokenizedExample]) -> Batch:
        rows = [(example.tokens, example.loss_mask) for example in examples]
        return demonstration_batch(rows, device=self.policy.device, temperature=self.temperature)

    def _tokenized(self, demonstration: Demonstration) -> TokenizedExample:
        """Cut to max_tokens. Raises InputError for one that does not fit, or whose cut leaves no target."""
        policy, alone = self.policy, self.sft.mask_history
        ends, tokenizer = policy.model_end_tokens, policy.tokenizer
        example = encode_demonstration(tokenizer, demonstration, end_tokens=ends, mask_history=alone)
        where, key, limit = demonstration.where, f"{self.key}.max_tokens", self._max_tokens
        if (count := len(example.tokens)) > limit:
            if self.sft.max_tokens is None:
                why = f"{count} tokens, more than the context of {limit}"
                raise InputError(f"{where}: {why}; cut it with {key}")
            example = TokenizedExample(example.tokens[:limit], example.loss_mask[:limit])
            self._truncated += 1
        if not any(example.loss_mask):
            why = f"its first {limit} tokens leave nothing to learn"
            raise InputError(f"{where}: {why}; raise {key} or drop it")
        return example

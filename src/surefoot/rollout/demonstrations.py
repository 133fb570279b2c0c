"""Demonstrations -> batches for supervised fine-tuning, and the likelihood of those held out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from surefoot.config import SFTConfig
from surefoot.data.batches import demonstration_batch, micro_batches
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.render import TokenizedExample, encode_demonstration
from surefoot.errors import InputError
from surefoot.rollout.text import LanguagePolicy
from surefoot.types import Batch, Demonstration

Poll = Callable[[], None] | None  # called between pieces of work; it may raise to give the work up


class DemonstrationRollout:
    """Takes a run's batches from demonstrations, in shuffled passes; nothing is generated.

    `key` is the section of `sft`'s fields, for errors. Raises InputError for a demonstration that does not
    fit, or if the data is not a checkpoint's.
    """

    unit = "examples"
    throughput = "throughput/tokens_per_s"
    latest = None

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
        if sft.max_tokens is not None and sft.max_tokens > policy.context_length:
            context = f"the model's context of {policy.context_length} tokens"
            raise InputError(f"{key}.max_tokens ({sft.max_tokens}) is more than {context}; lower it")
        self.policy, self.data, self.sft, self.seed = policy, data, sft, seed
        self.key, self.temperature, self.truncated = key, temperature, 0
        self._train = [self._tokenized(example) for example in data.train]
        self._held_out = [self._tokenized(example) for example in data.held_out]
        seen = repr([(example.tokens, example.loss_mask) for example in self._train])
        self._digest = hashlib.sha256(seen.encode()).hexdigest()

    @property
    def per_update(self) -> int:
        """Demonstrations in one update."""
        return min(self.sft.batch_size, len(self._train))

    def collect(self, *, first: int, count: int, version: int = 0, poll: Poll = None) -> Batch:
        """Demonstrations number `first` to `first + count` of the run."""
        started = time.perf_counter()
        numbers = range(first, first + count)
        batch = self._batch([self._train[self.data.training_index(n, self.seed)] for n in numbers])
        batch.version = version
        batch.metrics = {"time/rollout_s": time.perf_counter() - started, "time/score_s": 0.0}
        batch.metrics |= {
            "sft/epoch": (first + count) / len(self._train),
            "length/mean": float(batch.mask_BT.sum()) / len(batch),
        }
        return batch

    @torch.no_grad()
    def evaluate(
        self, episodes: int, *, version: int = 0, poll: Callable[[], None] | None = None
    ) -> tuple[dict[str, float], list[Demonstration]]:
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

    @property
    def can_evaluate(self) -> bool:
        """Whether demonstrations were held out."""
        return bool(self._held_out)

    @property
    def notice(self) -> str:
        """That demonstrations were cut, if any were."""
        if not self.truncated:
            return ""
        total = len(self._train) + len(self._held_out)
        limit = f"{self.key}.max_tokens ({self.sft.max_tokens})"
        return f"{self.truncated} of {total} examples are cut to {limit}"

    def start_over(self) -> None:
        """No environment is stepped here."""

    def state(self) -> dict[str, Any]:
        """A digest of the data: all that is random follows from counters."""
        return {"examples": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state`. Raises InputError if its demonstrations were others."""
        if state["examples"] != self._digest:
            raise InputError(f"{self.key}.data: not the data that the run began with; continue with that")

    def _batch(self, examples: Sequence[TokenizedExample]) -> Batch:
        rows = [(example.tokens, example.loss_mask) for example in examples]
        return demonstration_batch(rows, device=self.policy.device, temperature=self.temperature)

    def _tokenized(self, demonstration: Demonstration) -> TokenizedExample:
        """Cut to max_tokens. Raises InputError for one that does not fit, or whose cut leaves no target."""
        end_tokens, tokenizer = self.policy.model_end_tokens, self.policy.tokenizer
        example = encode_demonstration(tokenizer, demonstration, end_tokens=end_tokens)
        where, key = demonstration.where, f"{self.key}.max_tokens"
        count, limit = len(example.tokens), self.sft.max_tokens or self.policy.context_length
        if count > limit:
            if self.sft.max_tokens is None:
                raise InputError(
                    f"{where}: {count} tokens, more than the context of {limit}; cut it with {key}"
                )
            example = TokenizedExample(example.tokens[:limit], example.loss_mask[:limit])
            self.truncated += 1
        if not any(example.loss_mask):
            raise InputError(
                f"{where}: its first {limit} tokens leave nothing to learn; raise {key} or drop it"
            )
        return example

"""Batched decoding with continuous batching: admit, prefill, decode, retire.

Rows that finish leave the batch at once and waiting prompts take their place. A row's tokens depend on its prompt,
its seed and the weights alone (exactly so in float32, up to rounding at the boundary between two tokens).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from surefoot.generation.sampling import request_uniforms, sample
from surefoot.types import Completion, Request, SamplingParams, StopReason


class CacheWindow(Protocol):
    """Which columns of a cache are in use; the newest token of every row stands in column `end - 1`."""

    begin: int
    end: int
    columns: int


class KVCache(Protocol):
    """What the engine needs of a cache whose rows are right-aligned (`policies/lm/kv_cache.py`)."""

    window: Any  # a CacheWindow

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole rows over others."""
        ...

    def copy_from(self, other: Any, first_row: int, rows: int) -> None:
        """Append rows of another cache so that they end where this one's window ends."""
        ...

    def shift_to(self, new_end: int) -> None:
        """Move the columns in use so that they end at `new_end`."""
        ...


class TokenModel(Protocol):
    """What the engine needs of a model."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        ...

    def new_cache(self, *, slots: int, columns: int) -> Any:
        """An empty cache."""
        ...

    def step(
        self, tokens_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Feed tokens; logits [B, V] float32 and values [B] float32 at the last column."""
        ...


@dataclass
class _Row:
    """One sequence being written. `length` counts the tokens in the cache, prompt included."""

    index: int
    request: Request
    uniforms: list[float]
    completion: Completion
    length: int
    pending: int = 0  # sampled, not yet in the cache


@torch.no_grad()
def generate(
    model: TokenModel,
    requests: Sequence[Request],
    *,
    params: SamplingParams,
    end_tokens: frozenset[int],
    slots: int = 64,
    poll: Callable[[], None] | None = None,
) -> list[Completion]:
    """Continue every request; completions in the order of `requests`.

    At most `slots` rows are decoded at once. `poll` is called after each step and may raise to abandon the work.
    Raises ValueError for an empty prompt.
    """
    if any(not request.prompt for request in requests):
        raise ValueError("a prompt has no tokens")
    if not requests:
        return []
    engine = _Engine(model, requests, params, end_tokens, slots)
    while engine.rows or engine.waiting:
        engine.admit()
        engine.retire()
        if engine.rows:
            engine.decode()
            engine.retire()
        if poll is not None:
            poll()
    return engine.completions


class _Engine:
    """The state of one `generate` call."""

    def __init__(
        self,
        model: TokenModel,
        requests: Sequence[Request],
        params: SamplingParams,
        end_tokens: frozenset[int],
        slots: int,
    ):
        self.model, self.params, self.end_tokens = model, params, end_tokens
        self.slots = min(slots, len(requests))
        self.rows: list[_Row] = []
        self.waiting: deque[tuple[int, Request]] = deque(enumerate(requests))
        self.completions = [Completion([], [], [], [], StopReason.LENGTH) for _ in requests]
        self.longest_prompt = max(len(request.prompt) for request in requests)
        longest_row = self.longest_prompt + params.max_new_tokens
        # Room to move on by a whole answer before columns are shifted back; none is needed if nobody has to wait.
        slack = params.max_new_tokens if len(requests) > self.slots else 0
        self.cache: KVCache = model.new_cache(slots=self.slots, columns=longest_row + slack)
        self.cache.window.begin = self.cache.window.end = self.longest_prompt

    def admit(self) -> None:
        """Prefill waiting prompts into free slots, once enough are free to be worth a forward pass."""
        free = self.slots - len(self.rows)
        if not self.waiting or (self.rows and free < max(1, self.slots // 8)):
            return
        window = self.cache.window
        if not self.rows:
            window.begin = window.end = self.longest_prompt
        rows = [self._new_row(*self.waiting.popleft()) for _ in range(min(free, len(self.waiting)))]
        width = max(len(row.request.prompt) for row in rows)
        scratch = self.model.new_cache(slots=len(rows), columns=width)
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, width - len(row.request.prompt) :] = torch.tensor(row.request.prompt)
        lengths = torch.tensor([len(row.request.prompt) for row in rows])
        offsets_BT = torch.arange(width)[None] - (width - lengths[:, None])
        device = self.model.device
        logits_BV, values_B = self.model.step(
            tokens.to(device),
            offsets_BT.clamp(min=0).to(device),
            (offsets_BT >= 0).long().to(device),
            scratch,
        )
        scratch.window.end = width
        self.cache.copy_from(scratch, len(self.rows), len(rows))
        self.rows += rows
        self._write(rows, logits_BV, values_B)

    def decode(self) -> None:
        """Put every row's pending token into the cache and sample the next one."""
        window = self.cache.window
        if window.end == window.columns:
            self.cache.shift_to(max(self.longest_prompt, window.end - window.begin))
        lengths = torch.tensor([row.length for row in self.rows])
        columns = torch.arange(window.begin, window.end + 1)
        attention_BS = (columns[None] >= window.end - lengths[:, None]).long()
        tokens = torch.tensor([[row.pending] for row in self.rows])
        device = self.model.device
        logits_BV, values_B = self.model.step(
            tokens.to(device), lengths[:, None].to(device), attention_BS.to(device), self.cache
        )
        window.end += 1
        for row in self.rows:
            row.length += 1
        self._write(self.rows, logits_BV, values_B)

    def retire(self) -> None:
        """Let finished rows go: rows from the end move into their places."""
        finished = {i for i, row in enumerate(self.rows) if self._is_finished(row)}
        if not finished:
            return
        for i in finished:
            self.completions[self.rows[i].index] = self.rows[i].completion
        left = len(self.rows) - len(finished)
        targets = [i for i in sorted(finished) if i < left]
        sources = [i for i in range(left, len(self.rows)) if i not in finished]
        if targets:
            self.cache.move_rows(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[left:]
        if self.rows:
            self.cache.window.begin = self.cache.window.end - max(row.length for row in self.rows)

    def _new_row(self, index: int, request: Request) -> _Row:
        return _Row(
            index=index,
            request=request,
            uniforms=request_uniforms(request.seed, self.params.max_new_tokens).tolist(),
            completion=self.completions[index],
            length=len(request.prompt),
        )

    def _write(self, rows: list[_Row], logits_BV: Tensor, values_B: Tensor) -> None:
        """Sample one token for each row and record it with what the policy thought of it."""
        uniforms = torch.tensor(
            [row.uniforms[len(row.completion.tokens)] for row in rows], dtype=torch.float64
        )
        drawn = sample(logits_BV, uniforms, self.params)
        columns = [values.tolist() for values in (*drawn, values_B)]
        for row, token, logprob, entropy, value in zip(rows, *columns, strict=True):
            row.pending = token
            row.completion.tokens.append(token)
            row.completion.logprobs.append(logprob)
            row.completion.entropies.append(entropy)
            row.completion.values.append(value)

    def _is_finished(self, row: _Row) -> bool:
        tokens = row.completion.tokens
        if tokens[-1] in self.end_tokens:
            row.completion.stop_reason = StopReason.END_TOKEN
        elif row.request.is_stopped is not None and row.request.is_stopped(tokens):
            row.completion.stop_reason = StopReason.STOP_STRING
        else:
            return len(tokens) >= self.params.max_new_tokens
        return True

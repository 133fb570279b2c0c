"""The Engine protocol, and ours: batched decoding with continuous batching (admit, prefill, decode, retire).

Rows that finish leave the batch at once and waiting prompts take their place. A row's tokens depend on its
prompt, its seed and the weights alone (in float32, up to rounding at the boundary between two tokens).
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from surefoot.generation.sampling import request_uniforms, sample
from surefoot.types import Completion, Poll, Request, SamplingParams, Step, StopReason

MARGIN = 8  # characters: of the text of some last tokens this much may differ without the tokens before


class Engine(Protocol):
    """Whatever continues prompts: requests go in, completions come out as they finish, in any order."""

    exact_logprobs: bool  # its log-probs and values are the trainer's to rounding: they serve as the old ones

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue `requests`; the number of each, which its completion names too."""

    def poll(self) -> list[Completion]:
        """Go on for a while; the completions that finished since the last call, each handed out once."""

    def abort(self) -> None:
        """Forget every request whose completion was not handed out."""

    def sync(self, policy: Any, version: int) -> None:
        """Write with the weights that `policy` has now; completions begun from here on carry `version`."""


class TokenModel(Protocol):
    """What the token engine needs of a model."""

    exact_logprobs: bool

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""

    @property
    def model_end_tokens(self) -> frozenset[int]:
        """Tokens that end a completion."""

    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text that `tokens` add after the tokens `before`, in which stop strings are looked for."""

    def new_cache(self, *, slots: int, columns: int) -> Any:
        """An empty cache: `window`, `move_rows`, `copy_from` and `shift_to` (policies/lm/kv_cache.py)."""

    def step(self, tokens_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any) -> Step:
        """Feed tokens; logits [B, V] float32 and values [B] float32 at the last column."""


def generate(engine: Engine, requests: Sequence[Request], *, poll: Poll = None) -> list[Completion]:
    """The completion of every request, in their order, by an engine that has nothing else to do.

    `poll` is called after each of the engine's steps and may raise to abandon the work.
    """
    numbers = engine.submit(requests)
    completions: dict[int, Completion] = {}
    try:
        while not completions.keys() >= set(numbers):
            completions |= {completion.request_id: completion for completion in engine.poll()}
            if poll is not None:
                poll()
    except BaseException:
        engine.abort()
        raise
    return [completions[number] for number in numbers]


@dataclass
class _Row:
    request: Request
    uniforms: list[float]
    completion: Completion
    is_finished: bool = False
    window: int = 0  # where the tokens begin in whose text stop strings are looked for

    @property
    def length(self) -> int:
        """Tokens in the cache, prompt included; the last one sampled is not there yet."""
        return len(self.request.prompt) + len(self.completion.tokens) - 1


class TokenEngine:
    """Decodes at most `slots` rows at once with a model in this process, whose weights it shares.

    Requests are admitted in the order of submission, as soon as places are free. The cache is made for what
    waits when decoding begins: a later request that does not fit into it (a longer prompt, more new tokens)
    or is sampled differently waits, and those after it too, until the rows before it are done and a new cache
    is made. `end_tokens` replaces the model's.
    """

    def __init__(self, model: TokenModel, *, slots: int = 64, end_tokens: frozenset[int] | None = None):
        self.model, self.slots = model, slots
        self.end_tokens = model.model_end_tokens if end_tokens is None else end_tokens
        self.exact_logprobs = model.exact_logprobs
        self._version = 0
        self._submitted = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
        self._finished: list[Completion] = []
        self._cache: Any = None
        self._params = SamplingParams()  # of all rows in the cache
        self._places = self._longest_prompt = 0

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue `requests`; their numbers. Raises ValueError for an empty prompt."""
        if any(not request.prompt for request in requests):
            raise ValueError("a prompt has no tokens")
        numbered = [(next(self._submitted), request) for request in requests]
        self._waiting += numbered
        return [number for number, _ in numbered]

    @torch.no_grad()
    def poll(self) -> list[Completion]:
        """Write one token of every row; the completions that finished."""
        self._admit()
        self._retire()
        self._decode()
        self._retire()
        if not self._rows and not self._waiting:
            self._cache = None
        finished, self._finished = self._finished, []
        return finished

    def abort(self) -> None:
        """Forget what waits, is being written, or was not handed out."""
        self._waiting.clear()
        self._rows, self._finished, self._cache = [], [], None

    def sync(self, policy: Any, version: int) -> None:
        """Stamp what is begun from here on with `version`; the weights are shared, so none are copied.

        Raises RuntimeError while rows are being written, ValueError for a policy that isn't the engine's.
        """
        if policy is not self.model:
            raise ValueError("sync: a TokenEngine writes with the model that it was made for")
        if self._rows:
            writing = f"sync: {len(self._rows)} completions are being written"
            raise RuntimeError(f"{writing}; poll or abort them first")
        self._version = version

    def _fits(self, request: Request) -> bool:
        is_short = len(request.prompt) <= self._longest_prompt
        is_short &= request.params.max_new_tokens <= self._params.max_new_tokens
        return self._cache is not None and is_short and _are_alike(request.params, self._params)

    def _make_cache(self) -> None:
        params = self._waiting[0][1].params
        requests = (request for _, request in self._waiting)
        alike = list(itertools.takewhile(lambda request: _are_alike(request.params, params), requests))
        limit = max(request.params.max_new_tokens for request in alike)
        self._params = replace(params, max_new_tokens=limit)
        self._places = min(self.slots, len(alike))
        self._longest_prompt = max(len(request.prompt) for request in alike)
        # Where requests wait, with room to move on by a whole completion before columns are shifted back.
        columns = self._longest_prompt + limit * (1 + (len(alike) > self._places))
        self._cache = self.model.new_cache(slots=self._places, columns=columns)

    def _admit(self) -> None:
        """Prefill waiting prompts into free places, once enough are free to be worth a forward pass."""
        is_narrow = self._places < min(self.slots, len(self._waiting))
        if self._waiting and not self._rows and (is_narrow or not self._fits(self._waiting[0][1])):
            self._make_cache()
        free = self._places - len(self._rows)
        if self._rows and free < max(1, self._places // 8):
            return
        rows: list[_Row] = []
        while self._waiting and len(rows) < free and self._fits(self._waiting[0][1]):
            number, request = self._waiting.popleft()
            uniforms = request_uniforms(request.seed, request.params.max_new_tokens).tolist()
            begun = Completion([], [], [], [], StopReason.LENGTH, request_id=number, version=self._version)
            rows.append(_Row(request, uniforms, begun))
        if not rows:
            return
        if not self._rows:
            self._cache.window.begin = self._cache.window.end = self._longest_prompt
        prompts = [row.request.prompt for row in rows]
        width = max(map(len, prompts))
        scratch = self.model.new_cache(slots=len(rows), columns=width)
        tokens = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        offsets_BT = torch.arange(width) - torch.tensor([[width - len(prompt)] for prompt in prompts])
        self._step(rows, tokens, offsets_BT.clamp(min=0), (offsets_BT >= 0).long(), scratch)
        scratch.window.end = width
        self._cache.copy_from(scratch, len(self._rows), len(rows))
        self._rows += rows

    def _decode(self) -> None:
        """Put every row's last token into the cache and sample the next one."""
        if not self._rows:
            return
        window = self._cache.window
        if window.end == window.columns:
            self._cache.shift_to(max(self._longest_prompt, window.end - window.begin))
        lengths_B1 = torch.tensor([[row.length] for row in self._rows])
        attention_BS = (torch.arange(window.begin, window.end + 1) >= window.end - lengths_B1).long()
        tokens = torch.tensor([[row.completion.tokens[-1]] for row in self._rows])
        self._step(self._rows, tokens, lengths_B1, attention_BS, self._cache)
        window.end += 1

    def _retire(self) -> None:
        """Let finished rows go: rows from the end move into their places."""
        finished = [i for i, row in enumerate(self._rows) if row.is_finished]
        self._finished += [self._rows[i].completion for i in finished]
        left = len(self._rows) - len(finished)
        targets = [i for i in finished if i < left]
        sources = [i for i in range(left, len(self._rows)) if i not in finished]
        if targets:
            self._cache.move_rows(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                self._rows[target] = self._rows[source]
        del self._rows[left:]
        if self._rows:
            self._cache.window.begin = self._cache.window.end - max(row.length for row in self._rows)

    def _step(self, rows: list[_Row], tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> None:
        """Feed tokens, sample the next of each row and record it with its log-prob, entropy and value."""
        tokens, positions, mask = (x.to(self.model.device) for x in (tokens, positions, mask))
        logits_BV, values_B = self.model.step(tokens, positions, mask, cache)
        uniforms = [row.uniforms[len(row.completion.tokens)] for row in rows]
        drawn = sample(logits_BV, torch.tensor(uniforms, dtype=torch.float64), self._params)
        columns = [values.tolist() for values in (*drawn, values_B)]
        for row, token, logprob, entropy, value in zip(rows, *columns, strict=True):
            row.completion.tokens.append(token)
            row.completion.logprobs.append(logprob)
            row.completion.entropies.append(entropy)
            row.completion.values.append(value)
            row.is_finished = self._is_finished(row)

    def _is_finished(self, row: _Row) -> bool:
        tokens = row.completion.tokens
        if tokens[-1] in self.end_tokens:
            row.completion.stop_reason = StopReason.END_TOKEN
        elif row.request.stop and self._has_stop_string(row):
            row.completion.stop_reason = StopReason.STOP_STRING
        else:
            return len(tokens) >= row.request.params.max_new_tokens
        return True

    def _has_stop_string(self, row: _Row) -> bool:
        """Whether the completion's text has a stop string, which it had not a token before.

        So it would end in what the last token changed: the last tokens are looked at, as many as had text for
        the longest string before it came. What they look like without those before them is checked.
        """
        stop, text = row.request.stop, self._text_since(row, row.window)
        if any(string in text for string in stop):
            whole = self._text_since(row, 0) if row.window else text
            if any(string in whole for string in stop):
                return True
        needed = max(map(len, stop)) + MARGIN
        middle = (row.window + len(row.completion.tokens)) // 2
        # Parts of characters, which what comes may complete, do not count.
        is_enough = len(text) > 2 * needed
        if is_enough and len(self._text_since(row, middle).replace("\ufffd", "")) > needed:
            row.window = middle
        return False

    def _text_since(self, row: _Row, begin: int) -> str:
        return self.model.decode(row.completion.tokens[begin:], () if begin else row.request.prompt)


def _are_alike(one: SamplingParams, other: SamplingParams) -> bool:
    return replace(one, max_new_tokens=other.max_new_tokens) == other

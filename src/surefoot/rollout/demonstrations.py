"""Examples -> batches: tokens and the mask of what is to be imitated, made once; each epoch in an order of its own."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from surefoot.config import SFTConfig
from surefoot.data.demonstrations import Demonstrations
from surefoot.errors import InputError
from surefoot.rollout.batch import demonstration_batch, micro_batches
from surefoot.rollout.text import LanguagePolicy, encode_prompt
from surefoot.types import Batch, Demonstration


@dataclass(frozen=True)
class TokenizedExample:
    """One example as tokens, and which of them the loss falls on.

    Example: prompt (504, 2768), completion (314,) and end token 2: `TokenizedExample((504, 2768, 314, 2), (False, False, True, True))`.
    """

    tokens: tuple[int, ...]
    is_trained: tuple[bool, ...]


class DemonstrationRollout:
    """Takes a run's batches from examples, one after the other through shuffled epochs; nothing is generated.

    `key` is the section of `sft`'s fields, for errors. Raises InputError for an example that does not fit, or if the data is
    another than a checkpoint's.
    """

    unit = "examples"
    throughput = "throughput/tokens_per_s"

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
            raise InputError(
                f"{key}.max_tokens ({sft.max_tokens}) is more than the model's context of {policy.context_length} tokens"
            )
        if not policy.model_end_tokens:
            raise InputError(
                "policy.model: names no end token, without which an answer would never end; set its eos_token"
            )
        self.policy, self.data, self.sft, self.seed = policy, data, sft, seed
        self.key, self.temperature = key, temperature
        self.truncated = 0  # examples that were cut to max_tokens
        self._train = [self._lesson(example) for example in data.train]
        self._held_out = [self._lesson(example) for example in data.held_out]
        seen = repr([(lesson.tokens, lesson.is_trained) for lesson in self._train])
        self._digest = hashlib.sha256(seen.encode()).hexdigest()

    @property
    def per_update(self) -> int:
        """Examples in one update."""
        return min(self.sft.batch_size, len(self._train))

    def collect(
        self, *, first: int, count: int, version: int = 0, poll: Callable[[], None] | None = None
    ) -> Batch:
        """Examples number `first` to `first + count` of the run."""
        started = time.perf_counter()
        indices = [self.data.training_index(number, self.seed) for number in range(first, first + count)]
        batch = self._batch([self._train[index] for index in indices])
        batch.version = version
        batch.metrics = {
            "sft/epoch": (first + count) / len(self._train),
            "length/mean": float(batch.mask_BT.sum()) / len(batch),
            "time/rollout_s": time.perf_counter() - started,
            "time/score_s": 0.0,
        }
        return batch

    @torch.no_grad()
    def evaluate(
        self, episodes: int, *, poll: Callable[[], None] | None = None
    ) -> tuple[dict[str, float], list[Demonstration]]:
        """Likelihood of the first `episodes` held-out examples, under the policy as it is."""
        batch = self._batch(self._held_out[:episodes])
        nlls, tokens = [0.0] * len(batch), batch.mask_BT.sum(1).tolist()
        for rows in micro_batches(batch, torch.arange(len(batch)), self.sft.micro_batch_tokens):
            if poll is not None:
                poll()
            part = batch.rows(rows)
            view = self.policy.evaluate(part)
            for row, logprobs, mask in zip(rows.tolist(), view.logprobs_BT, part.mask_BT, strict=True):
                nlls[row] = -float(logprobs[mask].double().sum())
        nll = sum(nlls) / sum(tokens)
        metrics = {"eval/nll": nll, "eval/perplexity": math.exp(min(nll, 700.0)), "eval/metric": -nll}
        shown = zip(self.data.held_out, nlls, tokens, strict=False)  # the first of them
        return metrics, [replace(example, nll=total / count) for example, total, count in shown]

    @property
    def can_evaluate(self) -> bool:
        """Whether examples were held out."""
        return bool(self._held_out)

    @property
    def notice(self) -> str:
        """That examples were cut, if any were."""
        if not self.truncated:
            return ""
        total = len(self._train) + len(self._held_out)
        return (
            f"{self.truncated} of {total} examples are cut to {self.key}.max_tokens ({self.sft.max_tokens})"
        )

    def state(self) -> dict[str, Any]:
        """All that is random follows from counters; what the examples were is kept to be compared."""
        return {"examples": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`. Raises InputError for other examples than it was trained on."""
        if state["examples"] != self._digest:
            raise InputError(
                f"{self.key}.data: these are not the examples that the run was begun with; go on with the same ones"
            )

    def _batch(self, lessons: Sequence[TokenizedExample]) -> Batch:
        rows = [(lesson.tokens, lesson.is_trained) for lesson in lessons]
        return demonstration_batch(rows, device=self.policy.device, temperature=self.temperature)

    def _lesson(self, example: Demonstration) -> TokenizedExample:
        lesson = encode_demonstration(self.policy.tokenizer, example, end_tokens=self.policy.model_end_tokens)
        limit = self.sft.max_tokens or self.policy.context_length
        if len(lesson.tokens) > limit:
            if self.sft.max_tokens is None:
                raise InputError(
                    f"{example.where}: has {len(lesson.tokens)} tokens, more than the model's context of {limit}; shorten it, "
                    f"or let {self.key}.max_tokens cut it"
                )
            lesson = TokenizedExample(lesson.tokens[:limit], lesson.is_trained[:limit])
            self.truncated += 1
        if not any(lesson.is_trained):
            raise InputError(
                f"{example.where}: nothing to learn is left of it within {limit} tokens; raise {self.key}.max_tokens or drop it"
            )
        return lesson


def encode_demonstration(
    tokenizer: Any, example: Demonstration, *, end_tokens: frozenset[int]
) -> TokenizedExample:
    """Tokens and mask of one example.

    Prompt and completion are made tokens apart from each other, as they will be when the model writes the one after the
    other. The first token of all stands after nothing and is never trained.
    """
    if "messages" in example.contents:
        pieces = _chat_pieces(tokenizer, example, end_tokens)
    elif "text" in example.contents:
        pieces = [(encode_prompt(tokenizer, example.contents["text"]), True)]
    else:
        completion = tuple(tokenizer(example.contents["completion"], add_special_tokens=False)["input_ids"])
        pieces = [(encode_prompt(tokenizer, example.contents["prompt"]), False), (completion, True)]
    tokens = [token for piece, _ in pieces for token in piece]
    is_trained = [is_imitated for piece, is_imitated in pieces for _ in piece]
    if not tokens or tokens[-1] not in end_tokens:
        tokens.append(min(end_tokens) if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        is_trained.append(True)
    is_trained[0] = False
    return TokenizedExample(tuple(tokens), tuple(is_trained))


def _chat_pieces(
    tokenizer: Any, example: Demonstration, end_tokens: frozenset[int]
) -> list[tuple[tuple[int, ...], bool]]:
    """A chat cut where the assistant's turns begin and end, up to the last of them: (tokens, whether the assistant's)."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{example.where}: chats need a tokenizer with a chat template; this model's has none"
        )
    messages = example.contents["messages"]
    pieces: list[tuple[tuple[int, ...], bool]] = []
    before = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _rendered(tokenizer, messages[:number], example.where, open_turn=True)
        closed = _rendered(tokenizer, messages[: number + 1], example.where, open_turn=False)
        if not (opened.startswith(before) and closed.startswith(opened)):
            raise InputError(
                f"{example.where}: the model's chat template changes earlier turns as the chat goes on, so that none could be "
                "trained as it will be written; give each answer as a chat of its own"
            )
        asked, answered = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (opened[len(before) :], closed[len(opened) :])
        )
        # After the end token a template may have a line break, which nobody will have to write.
        end = max(
            (place + 1 for place, token in enumerate(answered) if token in end_tokens), default=len(answered)
        )
        pieces += [(asked, False), (answered[:end], True), (answered[end:], False)]
        before = closed
    return pieces[:-1]  # nor has what follows the last one


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], where: str, *, open_turn: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False))
    except (
        Exception
    ) as error:  # a template is a program, and may refuse roles or their order in its own words
        raise InputError(
            f"{where}: the model's chat template does not take it: {' '.join(str(error).split())}"
        ) from error

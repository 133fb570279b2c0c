"""The one-turn text task: prompts, and a reward for what the policy writes after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.seeds import derived_seed
from surefoot.errors import InputError
from surefoot.rewards.functions import RewardFunction

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One prompt and the other columns of its row, which the reward function gets as keywords.

    Example: `Example(prompt="2 + 2 =", columns={"answer": 4})`.
    """

    prompt: Prompt
    columns: dict[str, Any]

    @property
    def text(self) -> str:
        """The prompt as one string, the same for equal prompts."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)


class TextTask:
    """Prompts and a reward: the environment of a language policy.

    `prompts` is a list of strings, of message lists (`[{"role": "user", "content": …}]`) or of dicts with a `prompt`
    column and others; a JSONL file of such dicts or strings; or a `datasets.Dataset`. `reward` has TRL's signature:
    `reward(prompts, completions, **columns) -> list[float]`; `metric` has the same and judges evaluations apart from
    the reward. `held_out` is the fraction of prompts kept for evaluation, chosen by a hash of the text, or a list of
    prompts of its own. Raises InputError for prompts that are empty, of no usable type, or that don't exist.
    """

    def __init__(
        self,
        prompts: Any,
        reward: RewardFunction,
        *,
        metric: RewardFunction | None = None,
        held_out: float | Sequence[Any] = 0.1,
        prompt_column: str = "prompt",
        prompt_tokens: int | None = None,
        chat: bool = False,
    ):
        for name, function in (("reward", reward), ("metric", metric)):
            if function is not None and not callable(function):
                raise InputError(f"{name}: expected a function of (prompts, completions, **columns), got {function!r}")
        self.reward, self.metric = reward, metric
        self.prompt_tokens, self.chat = prompt_tokens, chat
        examples = _read_examples(prompts, prompt_column)
        if isinstance(held_out, (int, float)):
            self.train = [e for e in examples if _hash_fraction(e.text) >= held_out]
            self.held_out = [e for e in examples if _hash_fraction(e.text) < held_out]
        else:
            self.train, self.held_out = examples, _read_examples(held_out, prompt_column)
        if not self.train:
            raise InputError("no prompts to train on" + ("" if not examples else "; all of them were held out"))

    def training_example(self, episode: int, seed: int) -> Example:
        """The prompt of training episode number `episode`: every pass over the prompts has its own order."""
        passes, position = divmod(episode, len(self.train))
        return self.train[_order(len(self.train), seed, passes)[position]]


# One pass's order is asked for once per episode; keep the two in use.
_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(count: int, seed: int, passes: int) -> list[int]:
    key = (count, seed, passes)
    if key not in _orders:
        while len(_orders) >= 2:
            del _orders[next(iter(_orders))]
        generator = torch.Generator().manual_seed(derived_seed(seed, "prompt order", passes))
        _orders[key] = torch.randperm(count, generator=generator).tolist()
    return _orders[key]


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") / 2**64


def _read_examples(source: Any, column: str) -> list[Example]:
    if isinstance(source, (str, Path)):
        rows: Iterable[Any] = _read_jsonl(Path(source))
        where = str(source)
    elif isinstance(source, Iterable):
        rows, where = source, "prompts"
    else:
        raise InputError(f"prompts: expected a list, a JSONL file or a datasets.Dataset, got {type(source).__name__}")
    return [_example(row, column, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path) -> Iterable[Any]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError:
                        raise InputError(f"{path}, line {number}: not JSON; one object or string per line is needed") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _example(row: Any, column: str, where: str) -> Example:
    columns: dict[str, Any] = {}
    prompt = row
    if isinstance(row, Mapping):
        if column not in row:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
        prompt = row[column]
        columns = {str(name): value for name, value in row.items() if name != column}
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt is empty; give it text or drop the row")
        return Example(prompt, columns)
    is_chat = isinstance(prompt, list) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt)
    if not is_chat:
        raise InputError(f"{where}: a prompt is a string or a list of {{role, content}} messages, got {type(prompt).__name__}")
    if not prompt:
        raise InputError(f"{where}: the prompt has no messages; give it one or drop the row")
    return Example([dict(message) for message in prompt], columns)

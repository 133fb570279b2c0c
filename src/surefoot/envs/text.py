"""The one-turn text task: prompts, and a reward for what the policy writes after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.seeds import derived_seed
from surefoot.errors import InputError
from surefoot.rewards.functions import RewardFunction
from surefoot.rewards.mixed import MixedReward

Prompt = str | list[dict[str, Any]]

MAX_LINE_BYTES = 16_000_000  # far beyond any context; a file without line breaks must not fill the memory


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
    `reward(prompts, completions, **columns) -> list[float]`, or is a dict of such functions with their weights in the sum,
    `{"polite": (polite, 1.0), "long": (length, -0.01)}`; `metric`, a function, judges evaluations apart from the reward.
    `held_out` is the fraction of prompts kept for evaluation, chosen by a hash of the text, or a list of prompts of its
    own. Raises InputError for prompts that are empty, of no usable type, or that don't exist.
    """

    def __init__(
        self,
        prompts: Any,
        reward: RewardFunction | Mapping[str, tuple[RewardFunction, float]] | MixedReward,
        *,
        metric: RewardFunction | None = None,
        held_out: float | Sequence[Any] = 0.1,
        prompt_column: str = "prompt",
        prompt_tokens: int | None = None,
        chat: bool = False,
    ):
        reward = MixedReward(reward) if isinstance(reward, Mapping) else reward
        for name, function in (("reward", reward), ("metric", metric)):
            is_usable = callable(function) or (
                isinstance(function, MixedReward) if name == "reward" else function is None
            )
            if not is_usable:
                raise InputError(
                    f"{name}: expected a function of (prompts, completions, **columns), got {function!r}"
                )
        if prompt_tokens is not None and (not isinstance(prompt_tokens, int) or prompt_tokens < 1):
            raise InputError(
                f"prompt_tokens: expected a whole number above 0, or None, got {prompt_tokens!r}"
            )
        if isinstance(held_out, (int, float)) and not 0 <= held_out < 1:
            raise InputError(
                f"held_out: expected a fraction from 0 to below 1, or a list of prompts, got {held_out!r}"
            )
        if chat and prompt_tokens is not None:
            raise InputError(
                "task.prompt_tokens would cut the chat template's text; use it with plain prompts only"
            )
        self.reward, self.metric = reward, metric
        self.prompt_tokens, self.chat = prompt_tokens, chat
        examples = _read_examples(prompts, prompt_column, name="prompts")
        if not examples:
            where = prompts if isinstance(prompts, (str, Path)) else "prompts"
            raise InputError(f"{where}: no prompts there; one is needed at least")
        if isinstance(held_out, (int, float)):
            is_held_out = [hash_fraction(example.text) < held_out for example in examples]
            self.train = [example for example, held in zip(examples, is_held_out, strict=True) if not held]
            self.held_out = [example for example, held in zip(examples, is_held_out, strict=True) if held]
        else:
            self.train, self.held_out = examples, _read_examples(held_out, prompt_column, name="held_out")
        if not self.train:
            raise InputError(
                f"no prompts to train on: all {len(examples)} were held out; lower held_out or give more prompts"
            )

    def training_example(self, episode: int, seed: int) -> Example:
        """The prompt of training episode number `episode`: every pass over the prompts has its own order."""
        passes, position = divmod(episode, len(self.train))
        return self.train[shuffled(len(self.train), seed, passes)[position]]


# One pass's order is asked for once per episode; keep the two in use.
_orders: dict[tuple[int, int, int], list[int]] = {}


def shuffled(count: int, seed: int, passes: int) -> list[int]:
    """The order in which pass number `passes` over `count` examples goes: a permutation of their indices."""
    key = (count, seed, passes)
    if key not in _orders:
        while len(_orders) >= 2:
            del _orders[next(iter(_orders))]
        generator = torch.Generator().manual_seed(derived_seed(seed, "prompt order", passes))
        _orders[key] = torch.randperm(count, generator=generator).tolist()
    return _orders[key]


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") / 2**64
    )


def _read_examples(source: Any, column: str, *, name: str) -> list[Example]:
    return [_example(row, column, where) for where, row in read_rows(source, name)]


def read_rows(source: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSONL file's lines that are not blank, or of a list's or Dataset's rows, unchecked.

    Raises InputError, which calls the source `name`, for one that cannot be read.
    """
    if isinstance(source, (str, Path)):
        yield from _read_jsonl(Path(source), name)
    elif isinstance(source, Mapping) or hasattr(source, "iterrows"):
        raise InputError(
            f"{name}: a {type(source).__name__} is not a list of rows; take one split of a DatasetDict, or "
            "table.to_dict('records') of a DataFrame"
        )
    elif isinstance(source, Set):
        raise InputError(
            f"{name}: a set has another order in every process, and runs could not be repeated; give a list"
        )
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(source, start=1))
    else:
        raise InputError(
            f"{name}: expected a list, a JSONL file or a datasets.Dataset, got {type(source).__name__}"
        )


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield f"{path}, line {number}", _parse_line(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise InputError(
            f"{name}: no file {path}; a JSONL file, a list or a datasets.Dataset is needed"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse_line(line: bytes, where: str) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise InputError(
            f"{where}: longer than {MAX_LINE_BYTES:,} bytes; one object or string per line is needed"
        )
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; one object or string per line is needed") from None


def _example(row: Any, column: str, where: str) -> Example:
    columns: dict[str, Any] = {}
    prompt = row
    if isinstance(row, Mapping):
        if column not in row:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
        prompt = row[column]
        columns = {str(name): value for name, value in row.items() if name != column}
        if clash := columns.keys() & {"prompts", "completions"}:
            raise InputError(
                f"{where}: the reward function gets its own {min(clash)!r}; give that column another name"
            )
    return Example(checked_prompt(prompt, where), columns)


def checked_prompt(prompt: Any, where: str) -> Prompt:
    """`prompt` if it is a string or a list of messages that says something. Raises InputError otherwise."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt is empty; give it text or drop it")
        return checked_text(prompt, where)
    is_chat = isinstance(prompt, list) and all(
        isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt
    )
    if not is_chat:
        raise InputError(
            f"{where}: a prompt is a string or a list of {{role, content}} messages, got {type(prompt).__name__}"
        )
    if not prompt:
        raise InputError(f"{where}: the prompt has no messages; give it one or drop it")
    for message in prompt:
        for part in ("role", "content"):
            if not isinstance(message[part], str):
                raise InputError(f"{where}: a message's {part} is text, got {type(message[part]).__name__}")
            checked_text(message[part], where)
    return [dict(message) for message in prompt]


def checked_text(text: str, where: str) -> str:
    """`text` if it is whole characters. Raises InputError otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair is no character; mend the encoding") from None
    return text

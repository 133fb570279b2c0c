"""The one-turn text task: prompts, and a reward for what the policy writes after each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.data.rows import Prompt, checked_prompt, index_in_order, read_rows, split
from surefoot.errors import InputError
from surefoot.rewards.functions import RewardFunction
from surefoot.rewards.mixed import MixedReward


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

    `prompts` is a list of strings, of message lists (`[{"role": "user", "content": …}]`) or of dicts with a
    `prompt` column and others; a JSONL file of such; or a `datasets.Dataset`. `reward` has TRL's signature,
    `reward(prompts, completions, **columns) -> list[float]`, or is a list of such functions, or a dict of
    them with their weights in the sum, `{"polite": (polite, 1.0), "long": (length, -0.01)}`; `metric` is a
    measure for evaluations apart from it. `held_out` is the fraction of prompts kept for evaluation, by a
    hash of the text (`data/rows.py:split`), or a list of other prompts. Raises InputError for unusable
    prompts.
    """

    def __init__(
        self,
        prompts: Any,
        reward: RewardFunction
        | list[RewardFunction]
        | Mapping[str, tuple[RewardFunction, float]]
        | MixedReward,
        *,
        metric: RewardFunction | None = None,
        held_out: float | Sequence[Any] = 0.1,
        prompt_column: str = "prompt",
        prompt_tokens: int | None = None,
        chat: bool = False,
    ):
        reward = MixedReward(reward) if isinstance(reward, (Mapping, list, tuple)) else reward
        for name, function in (("reward", reward), ("metric", metric)):
            others = isinstance(function, MixedReward) if name == "reward" else function is None
            if not (callable(function) or others):
                signature = "(prompts, completions, **columns)"
                raise InputError(f"{name}: expected a function of {signature}, got {function!r}")
        if prompt_tokens is not None and (not isinstance(prompt_tokens, int) or prompt_tokens < 1):
            raise InputError(f"prompt_tokens: expected a whole number above 0, got {prompt_tokens!r}")
        self.reward, self.metric = reward, metric
        self.prompt_tokens, self.chat = prompt_tokens, chat
        examples = _read_examples(prompts, prompt_column, name="prompts")
        if not examples:
            source = prompts if isinstance(prompts, (str, Path)) else "prompts"
            raise InputError(f"{source}: no prompts there; at least one is needed")
        if isinstance(held_out, (int, float)):
            self.train, self.held_out = split(examples, [example.text for example in examples], held_out)
        else:
            self.train, self.held_out = examples, _read_examples(held_out, prompt_column, name="held_out")
            if isinstance(held_out, Iterator) and not self.held_out:
                what = "it has been read to its end, as the prompts were if it is the same"
                raise InputError(f"held_out: no prompts there; {what}. Give each its own, or a list")
        is_chat = chat or any(not isinstance(one.prompt, str) for one in (*self.train, *self.held_out))
        if is_chat and prompt_tokens is not None:
            what = "prompt_tokens would cut the chat template's text"
            raise InputError(f"task.{what}; drop it, or give prompts as text, without task.chat")

    def training_example(self, episode: int, seed: int) -> Example:
        """The prompt of training episode number `episode`: every pass over the prompts has its own order."""
        return self.train[index_in_order(episode, len(self.train), seed)]


def _read_examples(source: Any, column: str, *, name: str) -> list[Example]:
    return [_example(row, column, where) for where, row in read_rows(source, name)]


def _example(row: Any, column: str, where: str) -> Example:
    columns: dict[str, Any] = {}
    prompt = row
    if isinstance(row, Mapping):
        if column not in row:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
        prompt = row[column]
        columns = {str(name): value for name, value in row.items() if name != column}
        if clash := columns.keys() & {"prompts", "completions"}:
            raise InputError(f"{where}: the reward function has its own {min(clash)!r}; rename that column")
    return Example(checked_prompt(prompt, where), columns)

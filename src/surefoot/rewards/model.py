"""A reward model as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from surefoot.errors import InputError

Poll = Callable[[], None] | None  # called between pieces of work; it may raise to give the work up
Texts = Sequence[Sequence[Sequence[int]]]  # rows of K texts, as tokens


class TextScorer(Protocol):
    """What is asked of a reward model: tokens of a text, their scores, and what makes scores rewards."""

    shift: float
    scale: float

    def encode(self, prompt: Any, text: str, *, where: str) -> tuple[int, ...]:
        """Token ids of a prompt and what continues it. Raises InputError, naming `where`, if too long."""

    def scores(self, rows: Texts, poll: Poll = None) -> Tensor:
        """Scores of rows of K texts each, [B, K] float32 on the CPU, before `shift` and `scale`."""


class RewardScorer:
    """A reward model with the signature of a reward function: `scorer(prompts=[…], completions=[…])`.

    What goes in is text, so policy and reward model may have different tokenizers. Prompts and completions
    are strings, which are read as one text, or message lists, which go through the reward model's own chat
    template.
    """

    def __init__(self, policy: TextScorer):
        self.policy = policy

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """A calibrated score per completion. Raises InputError for a text longer than the model's context."""
        if isinstance(prompts, str) or isinstance(completions, str):
            what = "prompts and completions are lists"
            raise InputError(f"score: {what}; for one text write [prompt] and [completion]")
        if len(prompts) != len(completions):
            counts = f"{len(prompts)} prompts and {len(completions)} completions"
            raise InputError(f"score: {counts}; one prompt each is needed")
        if not completions:
            return []
        rows = [
            [self.policy.encode(prompt, _text(completion), where=f"reward model: text {number}")]
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1)
        ]
        scores_N = self.policy.scores(rows)[:, 0].double()
        return ((scores_N - self.policy.shift) / self.policy.scale).tolist()


def _text(completion: Any) -> str:
    is_text = isinstance(completion, str)
    return completion if is_text else "".join(str(message["content"]) for message in completion)

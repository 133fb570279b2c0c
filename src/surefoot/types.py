"""The nouns of Surefoot, each with a worked example.

Shape letters used in names all over the package: B rows (episodes, or parallel environments), T time steps
(for a language model: tokens of prompt and completion), V vocabulary, N completion tokens, D hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Names in the observations of environments.
OBSERVATION = "obs"  # of one that has none
ACTION_MASK = "action_mask"  # which actions are legal
LARGEST_BOUND = 2**16  # a bound of a space above it says nothing of how large the values are
EPISODE_STARTS = "state/episode_starts"  # [B, T] bool, of a recurrent policy: an episode begins here


Poll: TypeAlias = Callable[[], None] | None  # called between pieces of work; it may raise to give the work up
Step: TypeAlias = tuple[Tensor, Tensor]  # of a model: logits [B, V] and values [B], float32


class StopReason(str, Enum):
    """Why a trajectory ended."""

    END_TOKEN = "end_token"  # the policy wrote one of the end tokens: terminated
    STOP_STRING = "stop_string"  # the text written so far matched a stop string: terminated
    LENGTH = "length"  # the token limit cut it off

    @property
    def ended_by_itself(self) -> bool:
        """Whether the policy chose to stop."""
        return self is not StopReason.LENGTH


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Example: `SamplingParams(max_new_tokens=24, temperature=1.0)` samples from the whole distribution, whose
    log-probs are the policy's. `temperature=0` is greedy; `top_k` and `top_p` are for generation alone.
    """

    max_new_tokens: int = 24
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to continue, as plain data. `seed` alone decides its randomness, whatever its neighbors.

    Example: `Request(prompt=(504, 2768), seed=7, stop=("\n",))`.
    """

    prompt: tuple[int, ...]
    seed: int
    params: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()  # strings that end the completion once its text has them


@dataclass
class Completion:
    """What an engine wrote for one request: born together, never re-tokenized.

    Example: tokens [314, 2] with logprobs [-1.2, -0.3] and values [0.1, 0.4], `StopReason.END_TOKEN`: 2 is
    the end token, a trained action like any other. `values[t]` is the critic's V(s_t), read before token t.
    """

    tokens: list[int]
    logprobs: list[float]  # nats, under the distribution that was sampled from
    values: list[float]
    entropies: list[float]  # nats, exact, of the distribution each token was drawn from
    stop_reason: StopReason
    request_id: int = 0  # as `Engine.submit` numbered it
    version: int = 0  # of the weights that wrote it: as `Engine.sync` was told before it was begun


@dataclass
class Turn:
    """What the policy, or anyone else, added to a conversation. Tokens in, tokens out: none is re-tokenized.

    Example: `Turn((504, 2768), text="The film")`, a prompt; `Turn([314, 2], " was great", by_policy=True,
    logprobs=[-1.2, -0.3], values=[0.1, 0.4], reward=0.62)`, what the policy wrote after it.
    """

    tokens: Sequence[int]
    text: str = ""
    by_policy: bool = False  # then the columns of a `Completion` are here too; what others wrote has none
    logprobs: Sequence[float] = ()
    values: Sequence[float] = ()
    entropies: Sequence[float] = ()
    reward: float = 0.0  # paid for it: to the policy's last token up to its end
    version: int = 0  # of the weights that wrote it


@dataclass
class Trajectory:
    """One episode of a text task: the turns of a conversation. Most are two: the prompt and the completion.

    Example: `Trajectory("The film", [Turn((504, 2768)), Turn([314, 2], " was great", by_policy=True, ...)],
    StopReason.END_TOKEN, reward=0.62)`: the reward function gave 0.62 for " was great".
    """

    prompt: Any  # str, or chat messages
    turns: list[Turn]
    stop_reason: StopReason
    columns: dict[str, Any] = field(default_factory=dict)  # the task's other columns
    reward: float = float("nan")  # what the reward function gave; NaN: none applies, and it is left out
    reward_parts: dict[str, float] = field(default_factory=dict)  # what it was made of: see rewards/
    extra: dict[str, Any] = field(default_factory=dict)  # what a reward function logged of it
    kl: float = 0.0  # log p - log p_ref summed over the policy's tokens, nats

    @property
    def is_rewarded(self) -> bool:
        """Whether a reward applies to it."""
        return not math.isnan(self.reward)

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The first turn's."""
        return tuple(self.turns[0].tokens)

    @property
    def completion_tokens(self) -> list[int]:
        """All that the policy wrote."""
        return [token for turn in self.turns if turn.by_policy for token in turn.tokens]

    @property
    def completion_text(self) -> str:
        """All that the policy wrote, as text."""
        return "".join(turn.text for turn in self.turns if turn.by_policy)

    def record(self) -> dict[str, Any]:
        """Its line in samples.jsonl; the turns are in it where there are more than prompt and completion."""
        names = ("text", "by_policy", "reward")
        turns = [{name: getattr(turn, name) for name in names} for turn in self.turns]
        found = {"prompt": self.prompt, "completion": self.completion_text}
        found |= {"tools": tools} if (tools := self.columns.get("tools")) else {}
        found |= {"tokens": len(self.completion_tokens), "stop_reason": self.stop_reason.value}
        found |= {"reward": self.reward_parts or {"reward": self.reward}, "kl": self.kl}
        found |= {"extra": self.extra} if self.extra else {}
        return found | ({"turns": turns} if len(turns) > 2 else {})


@dataclass(frozen=True)
class Episode:
    """One finished episode of an environment.

    Example: `Episode(total=500.0, steps=500, truncated=True)`, a pole held up until the time limit.
    """

    total: float  # sum of the rewards, undiscounted, as the environment gave them
    steps: int
    truncated: bool  # cut off by a limit: it did not end by itself
    info: dict[str, float] = field(default_factory=dict)  # numbers of its last info, such as `is_success`

    def record(self) -> dict[str, Any]:
        """Its line in samples.jsonl."""
        return {"return": self.total, "steps": self.steps, "truncated": self.truncated, **self.info}


@dataclass(frozen=True)
class Preference:
    """A pair of texts of which people chose the first, or one text that they rated.

    Examples: `Preference("pairs.jsonl, line 3", "The film", (" was great", " was long"), 0.0)`, without a
    margin; `Preference("data, row 1", None, ("A lovely film.",), 3.2)`, a text rated 3.2.
    """

    where: str  # for errors
    prompt: Any  # str, chat messages, or None
    texts: tuple[str, ...]  # chosen and rejected, or the one rated
    label: float  # a pair's margin, a text's rating
    # Of the texts, where it was evaluated: before calibration; with DPO implicit rewards.
    scores: tuple[float, ...] | None = None

    def record(self) -> dict[str, Any]:
        """Its line in samples.jsonl."""
        names, label = (("chosen", "rejected"), "margin") if len(self.texts) == 2 else (("text",), "rating")
        texts = dict(zip(names, self.texts, strict=True))
        return {"prompt": self.prompt, **texts, label: self.label, "scores": self.scores}


@dataclass(frozen=True)
class Demonstration:
    """An example to train on. Loss falls on the text, the completion, or the assistant's messages.

    Example: `Demonstration("reviews.jsonl, line 3", {"prompt": "The film", "completion": " was great"})`.
    """

    where: str  # for errors
    contents: dict[str, Any]  # `text`; `prompt` and `completion`; or `messages`
    tools: Any = None  # the functions that `messages` may call, for the chat template
    nll: float | None = None  # of its trained tokens, mean, nats, where it was evaluated

    def record(self) -> dict[str, Any]:
        """Its line in samples.jsonl."""
        return {**self.contents, "nll": self.nll}


def nothing() -> Tensor:
    """What stands in a batch for a tensor that its objective has no use for."""
    return torch.empty(0)


@dataclass
class Batch:
    """What happened, as tensors and plain values: the one thing that travels from the rollout to the loss.

    A language batch has one episode a row and a mask over the tokens the policy itself wrote; a Gymnasium
    batch one environment a row and a full mask. `logprobs_BT[b, t]` and `values_BT[b, t]` are of the action
    at t, given what was before it. Example (prompt of 2 tokens, completions of 2 and 1):

        observations["tokens"]  [[11, 12, 21,  2], [13, 14,  2,  0]]
        mask_BT                 [[ 0,  0,  1,  1], [ 0,  0,  1,  0]]
        ends_BT                 [[ 0,  0,  0,  1], [ 0,  0,  1,  0]]
        rewards_BT              [[ 0,  0,  0, .6], [ 0,  0, .1,  0]]

    A batch of demonstrations has observations and actions; one of preferences observations and `labels_B`.
    """

    observations: dict[str, Tensor]  # what the policy needs to evaluate again; first dimension B
    mask_BT: Tensor  # bool
    actions_BT: Tensor = field(default_factory=nothing)
    logprobs_BT: Tensor = field(default_factory=nothing)  # float32, nats: the policy before this update
    values_BT: Tensor = field(default_factory=nothing)  # float32; without them `evaluate` need give none
    rewards_BT: Tensor = field(default_factory=nothing)  # float32, after shaping and before the KL penalty
    ends_BT: Tensor = field(default_factory=nothing)  # bool: the trajectory ends after this step
    # float32, read where ends_BT: V(final observation) where truncated, 0 where terminated
    bootstrap_BT: Tensor = field(default_factory=nothing)
    labels_B: Tensor = field(default_factory=nothing)  # float32: margins of pairs, or ratings
    reference_B2: Tensor = field(default_factory=nothing)  # float32, nats: log-probs of pairs' completions
    groups_B: Tensor | None = None  # int64: rows with the same number continue the same prompt
    baselines_B: Tensor | None = None  # float32: the reward of the greedy completion of the row's prompt
    truncated_B: Tensor = field(default_factory=nothing)  # bool: the token limit cut the trajectory off
    reference_logprobs_BT: Tensor | None = None  # float32, nats: the frozen reference
    behavior_logprobs_BT: Tensor | None = None  # the sampler's own, kept where logprobs_BT was computed again
    advantages_BT: Tensor = field(default_factory=nothing)
    returns_BT: Tensor | None = None  # what a critic learns; None where there is none
    trajectories: list[Trajectory] | list[Episode] | list[Demonstration] = field(default_factory=list)
    temperature: float = 1.0  # the logits were divided by it when the actions were drawn; of text alone
    step_limit: int | None = None  # most steps the policy may take in a row
    row_size: int = 1  # what a row counts for in `batch_size`: an episode 1, a sequence its timesteps
    collected: int | None = None  # units of the run's budget in it; None: its rows
    needs_logprobs: bool = False  # logprobs_BT and values_BT are still to be filled in
    version: int = 0  # number of updates the policy had seen when it wrote this
    metrics: dict[str, float] = field(default_factory=dict)  # measured while collecting

    def __len__(self) -> int:
        return self.mask_BT.shape[0]

    def rows(self, indices: Tensor | slice) -> "Batch":
        """The rows at `indices` (int64, [b], or a slice), cut to their longest, without the trajectories."""
        longest = self.mask_BT.shape[1]
        if longest > 1:
            written_T = self.mask_BT[indices].any(0)
            longest = int(written_T.nonzero().max()) + 1 if written_T.any() else 1

        def take(value: Tensor) -> Tensor:
            picked = value[indices]
            return picked[:, :longest] if picked.dim() > 1 and picked.shape[1] > longest else picked

        return self._changed(take)

    def flatten(self) -> "Batch":
        """Each masked step as a row, [N, 1], which counts 1 in `batch_size`; no copy if all are masked."""
        mask_BT, (rows, length), is_full = self.mask_BT, self.mask_BT.shape, bool(self.mask_BT.all())

        def take(value: Tensor) -> Tensor:
            if value.dim() > 1 and value.shape[:2] == (rows, length):
                return (value.flatten(0, 1) if is_full else value[mask_BT])[:, None]
            return value.repeat_interleave(mask_BT.sum(1), 0)

        return replace(self._changed(take), row_size=1)

    def to(self, device: torch.device) -> "Batch":
        """The batch with all its tensors on `device`."""
        return replace(self._changed(lambda value: value.to(device)), trajectories=self.trajectories)

    def _changed(self, take: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changes: dict[str, Any] = {name: take(v) for name, v in tensors.items() if v.shape != (0,)}
        observations = {name: take(value) for name, value in self.observations.items()}
        return replace(self, **changes, observations=observations, trajectories=[])


@dataclass
class Evaluation:
    """A policy's view of a batch: log-probs, values and entropies, [B, T] float32; anything off the mask.

    Of a reward model's batch, whose rows have K texts each, the values are the texts' scores, [B, K].
    """

    logprobs_BT: Tensor
    values_BT: Tensor
    entropies_BT: Tensor

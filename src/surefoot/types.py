"""The nouns of Surefoot, each with a worked example.

Shape letters used in names all over the package: B rows (episodes, or parallel environments), T time steps (for a
language model: tokens of prompt and answer), V vocabulary, N written tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from torch import Tensor


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

    Example: `SamplingParams(max_new_tokens=24, temperature=1.0)` samples from the whole distribution, the only way
    whose log-probs are the policy's own. `temperature=0` is greedy; `top_k` and `top_p` are for generation alone.
    """

    max_new_tokens: int = 24
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `seed` alone decides its randomness, whatever its neighbours.

    Example: `Request(prompt=(504, 2768), seed=7)`.
    """

    prompt: tuple[int, ...]
    seed: int
    is_stopped: Callable[[Sequence[int]], bool] | None = None  # stop strings, seen from the tokens written so far


@dataclass
class Completion:
    """What the engine wrote for one request: born together, never re-tokenised.

    Example: tokens [314, 2] with logprobs [-1.2, -0.3] and values [0.1, 0.4], `StopReason.END_TOKEN`: token 2 is the
    end token, a trained action like any other. `values[t]` is the critic's V(s_t), read before token t was written.
    """

    tokens: list[int]
    logprobs: list[float]  # nats, under the distribution that was sampled from
    values: list[float]
    entropies: list[float]  # nats, exact, of the distribution each token was drawn from
    stop_reason: StopReason


@dataclass
class Trajectory:
    """One episode of a text task, from prompt to score.

    Example: the prompt "The film" answered with " was great", scored 0.62 by the reward function:
    `Trajectory(prompt="The film", prompt_tokens=(504, 2768), completion=Completion(...), text=" was great", score=0.62)`
    """

    prompt: Any  # str, or chat messages
    prompt_tokens: tuple[int, ...]
    completion: Completion
    text: str
    columns: dict[str, Any] = field(default_factory=dict)  # the task's other columns
    score: float = float("nan")  # what the reward function gave
    reward_parts: dict[str, float] = field(default_factory=dict)  # what became of it: penalty, scaling, clipping
    kl: float = 0.0  # log p - log p_ref summed over the written tokens, nats


@dataclass
class Batch:
    """What happened, as tensors: the one thing that travels from the rollout to the loss.

    A language batch has one episode a row and a mask over the tokens the policy itself wrote; a Gymnasium batch one
    environment a row and a full mask. `logprobs_BT[b, t]` and `values_BT[b, t]` belong to the action at t, given what
    was before it. Example (prompt of 2 tokens, answer of 2 and 1):

        observations["tokens"]  [[11, 12, 21,  2], [13, 14,  2,  0]]
        mask_BT                 [[ 0,  0,  1,  1], [ 0,  0,  1,  0]]
        ends_BT                 [[ 0,  0,  0,  1], [ 0,  0,  1,  0]]
        rewards_BT              [[ 0,  0,  0, .6], [ 0,  0, .1,  0]]
    """

    observations: dict[str, Tensor]  # what the policy needs to evaluate again; first dimension B
    actions_BT: Tensor
    mask_BT: Tensor  # bool
    logprobs_BT: Tensor  # float32, nats: the policy before this update; the loss's denominator
    values_BT: Tensor  # float32
    rewards_BT: Tensor  # float32, the environment's, after shaping and before the KL penalty
    ends_BT: Tensor  # bool: the trajectory ends after this step
    bootstrap_BT: Tensor  # float32: V(final observation) where truncated, 0 where terminated; read where ends_BT
    reference_logprobs_BT: Tensor | None = None  # float32, nats: the frozen reference
    behaviour_logprobs_BT: Tensor | None = None  # the sampler's own, kept when logprobs_BT was scored again
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    trajectories: list[Trajectory] = field(default_factory=list)
    version: int = 0  # number of updates the policy had seen when it wrote this
    metrics: dict[str, float] = field(default_factory=dict)  # measured while collecting

    def __len__(self) -> int:
        return self.mask_BT.shape[0]

    def rows(self, indices: Tensor) -> Batch:
        """The rows at `indices` (int64, [b]), cut to the longest of them."""
        length = int(self.mask_BT[indices].any(0).nonzero().max()) + 1 if self.mask_BT[indices].any() else 1

        def take(value: Tensor) -> Tensor:
            picked = value[indices]
            return picked[:, :length] if picked.dim() > 1 else picked

        changes: dict[str, Any] = {
            f.name: take(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        changes["observations"] = {name: take(value) for name, value in self.observations.items()}
        changes["trajectories"] = [self.trajectories[i] for i in indices.tolist()] if self.trajectories else []
        return replace(self, **changes)


@dataclass
class Evaluation:
    """A policy's view of a batch: log-probs, values and (where asked for) entropies, [B, T] float32, 0 off the mask."""

    logprobs_BT: Tensor
    values_BT: Tensor
    entropies_BT: Tensor

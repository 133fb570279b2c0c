"""Self-play: opponents in two-player games are snapshots of the policy, and a player that moves at random."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.config import SelfPlayConfig
from surefoot.errors import InputError
from surefoot.policies.base import ActingPolicy
from surefoot.types import Episode

RANDOM = -1  # stands where a snapshot has its number
ELO_STEP = 4.0  # K: small, since an update has hundreds of games


class OpponentPool:
    """Moves for the opponents of N games (`GameVectorEnv.opponents`), and keeps everyone's Elo.

    A snapshot is a frozen copy of the policy, named by the number of updates it had seen. A game's opponent
    is drawn from the game's own generator at its first move and stays to the end: a snapshot of the pool, the
    latest (the learner as it was when the rollout began), or the random player (`RANDOM`). Elo is anchored at
    0 for the random player, whose rating stays; games against the latest, who is the learner, do not count.
    """

    def __init__(self, policy: ActingPolicy, env: Any, settings: SelfPlayConfig):
        if policy.reads_whole_rows:
            raise InputError("policy.model: two-player games are for policies without an LSTM: MlpPolicy, …")
        self.policy, self.settings = policy, settings
        self.pool: list[int] = []  # oldest first
        self.latest = RANDOM  # before the first rollout
        self.snapshots: dict[int, ActingPolicy] = {}  # of the pool, the latest, and those of games under way
        self.elo = 0.0  # the learner's
        self.ratings = {RANDOM: 0.0}  # and of the pool
        self.playing = np.full(env.num_envs, RANDOM)  # the opponents, int [N]
        self._rngs: Sequence[np.random.Generator] = env.rngs
        self._known: list[Any] = [None] * env.num_envs  # a game's generator is new where the game is
        self._moves: list[list[int]] = [[] for _ in range(env.num_envs)]  # the opponents', in games under way
        self._replayed: list[int] | None = None  # while games are repeated: how many of those moves were
        env.opponents = self

    def begin(self, version: int) -> None:
        """A rollout begins: the learner, after `version` updates, is now the latest snapshot."""
        in_use = {*self.pool, *self.playing.tolist()}
        self.snapshots = {number: policy for number, policy in self.snapshots.items() if number in in_use}
        self.snapshots.setdefault(version, _frozen(self.policy))
        self.latest = version
        if version % self.settings.snapshot_every == 0 and version not in self.pool:
            self.pool = thinned([*self.pool, version], self.settings.pool_size)
            kept = {number: self.ratings.get(number, self.elo) for number in self.pool}
            self.ratings = {RANDOM: 0.0} | kept

    def __call__(self, observations: Mapping[str, NDArray[Any]], indices: NDArray[Any]) -> NDArray[Any]:
        """One move [M] in each of the games `indices` [M], sampled; one forward pass for each policy."""
        for i in indices:
            if self._known[i] is not self._rngs[i]:
                self._begin_game(int(i))
        masks = observations["action_mask"].astype(bool)
        # Random play and sampling draw alike: argmax of Gumbel noise is uniform, of logits + noise softmax.
        noise = np.stack([self._rngs[i].gumbel(size=masks.shape[1]) for i in indices]).astype(np.float32)
        at_random = np.array([self._rngs[i].random() for i in indices]) < self.settings.random_move_prob
        if self._replayed is not None:
            return self._repeated(masks, indices)
        actions = np.where(masks, noise, -np.inf).argmax(1)
        opponents = np.where(at_random, RANDOM, self.playing[indices])
        for number in np.unique(opponents[opponents != RANDOM]).tolist():
            rows, policy = np.flatnonzero(opponents == number), self.snapshots[number]
            prepared = policy.prepare({name: values[rows] for name, values in observations.items()})
            starts = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
            drawn = torch.from_numpy(noise[rows]).to(policy.device)
            actions[rows] = policy.act(prepared, {}, episode_starts=starts, noise=drawn)[0].cpu().numpy()
        for i, action in zip(indices.tolist(), actions.tolist(), strict=True):
            self._moves[i].append(action)
        return np.asarray(actions)

    def count(self, games: Sequence[Episode]) -> dict[str, float]:
        """Rate the learner by games that it finished; the metrics of self-play."""
        scores = [(game.info["outcome"] + 1.0) / 2.0 for game in games]
        for game, score in zip(games, scores, strict=True):
            opponent = int(game.info["opponent"])
            if opponent in self.ratings and opponent != self.latest:
                gain = elo_gain(self.elo, self.ratings[opponent], score)
                self.elo += gain
                self.ratings[opponent] -= gain if opponent != RANDOM else 0.0
        metrics = {"selfplay/games": float(len(games)), "selfplay/elo": self.elo}
        return metrics | ({"selfplay/win_rate": sum(scores) / len(scores)} if games else {})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold apart from `tensors`, as JSON."""
        return {
            "pool": self.pool[:],
            "latest": self.latest,
            "elo": self.elo,
            "ratings": list(self.ratings.items()),
            "snapshots": [(number, policy.state()) for number, policy in self.snapshots.items()],
            "playing": self.playing.tolist(),
            "moves": [moves[:] for moves in self._moves],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights of all snapshots as `<number>/<parameter>`; they are frozen, so not copied."""
        return {
            f"{number}/{name}": parameter.data
            for number, policy in self.snapshots.items()
            for name, parameter in policy.named_parameters_to_train()
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors`: until `go_on`, games that are repeated get the moves they had."""
        self.pool, self.latest, self.elo = list(state["pool"]), state["latest"], state["elo"]
        self.ratings = {int(number): float(rating) for number, rating in state["ratings"]}
        self.snapshots = {}
        for number, policy_state in state["snapshots"]:
            policy = self.snapshots[number] = _frozen(self.policy)
            policy.restore(policy_state)
            for name, parameter in policy.named_parameters_to_train():
                parameter.data.copy_(tensors[f"{number}/{name}"])
        self.playing[:] = state["playing"]
        self._moves = [list(moves) for moves in state["moves"]]
        self._known = [None] * len(self._known)
        self._replayed = [0] * len(self._known)

    def go_on(self) -> None:
        """The games are where they were; from here on the opponents choose."""
        self._replayed = None

    def _begin_game(self, game: int) -> None:
        self._known[game] = self._rngs[game]
        drawn, latest, random = self._rngs[game].random(), self.settings.latest, self.settings.random
        if self._replayed is not None:
            self._replayed[game] = 0
            return
        self._moves[game] = []
        if drawn < random or drawn < random + latest or not self.pool:
            self.playing[game] = RANDOM if drawn < random else self.latest
        else:
            share = (drawn - random - latest) / (1.0 - random - latest)
            self.playing[game] = self.pool[min(int(share * len(self.pool)), len(self.pool) - 1)]

    def _repeated(self, masks: NDArray[np.bool_], indices: NDArray[Any]) -> NDArray[Any]:
        """The moves that were made. A game that waits for its reset (`Vector.restore`) gets any legal one."""
        assert self._replayed is not None
        actions: NDArray[Any] = masks.argmax(1)
        for row, i in enumerate(indices.tolist()):
            moves, at = self._moves[i], self._replayed[i]
            if at < len(moves) and masks[row, moves[at]]:
                actions[row] = moves[at]
            self._replayed[i] += 1
        return actions


def thinned(numbers: list[int], size: int) -> list[int]:
    """`numbers` (rising) down to `size`, without those that crowd most; the last and the first stay longest.

    Self-play goes in circles: snapshots spread over the whole past keep it from forgetting.
    """
    while len(numbers) > size:
        inner = range(1, len(numbers) - 1)
        crowded = min(inner, key=lambda k: numbers[k + 1] - numbers[k - 1]) if size > 1 else 0
        numbers = numbers[:crowded] + numbers[crowded + 1 :]
    return numbers


def elo_gain(rating: float, other: float, score: float) -> float:
    """What a rating gains, and the other loses, by a game of this score (1 won, ½ drawn, 0 lost)."""
    expected: float = 1.0 / (1.0 + 10.0 ** ((other - rating) / 400.0))
    return ELO_STEP * (score - expected)


def _frozen(policy: ActingPolicy) -> ActingPolicy:
    snapshot = copy.deepcopy(policy)
    for _, parameter in snapshot.named_parameters_to_train():
        parameter.grad = None
    return snapshot

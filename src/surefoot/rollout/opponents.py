"""Self-play: the opponents in two-player games are the policy's own past and present, and a player that moves at random."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.config import SelfPlayConfig
from surefoot.errors import InputError
from surefoot.types import Episode

if TYPE_CHECKING:
    from surefoot.policies.base import ActingPolicy

RANDOM = -1  # stands where a self has its number
ELO_STEP = 4.0  # K: small, since an update has hundreds of games


class OpponentPool:
    """Moves for the opponents of N games (`GameVectorEnv.opponents`), and keeps everyone's Elo.

    A self is a frozen copy of the policy, named by the number of updates it had seen. A game's opponent is drawn from the
    game's own generator at its first move and stays the same to the end, also when the learner goes on to learn: the pool
    of past selves, the newest self (the learner as it was when the rollout began), or the random player (`RANDOM`).

    Elo is anchored at 0 for the random player. Learner and past selves take points from one another, so that their sum
    moves by games against the random player alone; games against the newest self, who is the learner, count for nothing.
    """

    def __init__(self, policy: ActingPolicy, env: Any, settings: SelfPlayConfig):
        if policy.reads_whole_rows:
            raise InputError(
                "policy.model: two-player games are for policies without an LSTM; use MlpPolicy or CnnPolicy"
            )
        self.policy, self.settings = policy, settings
        self.pool: list[int] = []  # the past selves, oldest first
        self.newest = RANDOM  # before the first rollout
        self.selves: dict[int, ActingPolicy] = {}  # of the pool, the newest, and those of games under way
        self.elo = 0.0  # the learner's
        self.ratings = {RANDOM: 0.0}  # and of the pool
        self.playing = np.full(env.num_envs, RANDOM)  # the opponents, int [N]
        self._rngs: Sequence[np.random.Generator] = env.rngs
        self._known: list[np.random.Generator | None] = [
            None
        ] * env.num_envs  # a game's generator is new where the game is
        self._moves: list[list[int]] = [
            [] for _ in range(env.num_envs)
        ]  # the opponents', in the games under way
        self._replayed: list[int] | None = None  # while games are played again: how many of those moves were
        env.opponents = self

    def begin(self, version: int) -> None:
        """A rollout begins: the learner, after `version` updates, is now the newest self."""
        met = {*self.pool, *self.playing.tolist()}
        self.selves = {number: one for number, one in self.selves.items() if number in met}
        self.selves.setdefault(version, _frozen(self.policy))
        self.newest = version
        if version % self.settings.snapshot_every == 0 and version not in self.pool:
            self.pool = thinned([*self.pool, version], self.settings.pool_size)
            self.ratings = {RANDOM: 0.0} | {
                number: self.ratings.get(number, self.elo) for number in self.pool
            }

    def __call__(self, observations: Mapping[str, NDArray[Any]], indices: NDArray[Any]) -> NDArray[Any]:
        """One move [M] in each of the games `indices` [M]: the policies are sampled, one forward pass for each of them."""
        for i in indices:
            if self._known[i] is not self._rngs[i]:
                self._begin_game(int(i))
        masks = observations["action_mask"].astype(bool)
        # Random play and sampling take the same draws: the largest of Gumbel noise is uniform, of logits + noise softmax.
        noise = np.stack([self._rngs[i].gumbel(size=masks.shape[1]) for i in indices]).astype(np.float32)
        blundering = np.array([self._rngs[i].random() for i in indices]) < self.settings.random_move_prob
        if self._replayed is not None:
            return self._again(masks, indices)
        actions = np.where(masks, noise, -np.inf).argmax(1)
        opponents = np.where(blundering, RANDOM, self.playing[indices])
        for number in np.unique(opponents[opponents != RANDOM]).tolist():
            rows = np.flatnonzero(opponents == number)
            prepared = self.selves[number].prepare(
                {name: values[rows] for name, values in observations.items()}
            )
            starts = torch.zeros(len(rows), dtype=torch.bool, device=self.policy.device)
            drawn = torch.from_numpy(noise[rows]).to(self.policy.device)
            actions[rows] = self.selves[number].act(prepared, {}, starts=starts, noise=drawn)[0].cpu().numpy()
        for i, action in zip(indices.tolist(), actions.tolist(), strict=True):
            self._moves[i].append(action)
        return np.asarray(actions)

    def count(self, games: Sequence[Episode]) -> dict[str, float]:
        """Rate the learner by games that it finished; the metrics of self-play."""
        scores = [(game.info["outcome"] + 1.0) / 2.0 for game in games]
        for game, score in zip(games, scores, strict=True):
            opponent = int(game.info["opponent"])
            if opponent in self.ratings and opponent != self.newest:
                gain = elo_gain(self.elo, self.ratings[opponent], score)
                self.elo += gain
                self.ratings[opponent] -= gain if opponent != RANDOM else 0.0
        metrics = {"selfplay/games": float(len(games)), "selfplay/elo": self.elo}
        return metrics | ({"selfplay/win_rate": sum(scores) / len(scores)} if games else {})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold apart from `tensors`, as JSON."""
        return {
            "pool": self.pool[:],
            "newest": self.newest,
            "elo": self.elo,
            "ratings": list(self.ratings.items()),
            "selves": [(number, one.state()) for number, one in self.selves.items()],
            "playing": self.playing.tolist(),
            "moves": [moves[:] for moves in self._moves],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights of all selves as `<number>/<parameter>`. They are frozen: no copies are made."""
        return {
            f"{number}/{name}": parameter.data
            for number, one in self.selves.items()
            for name, parameter in one.named_parameters_to_train()
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors`: until `go_on`, games that are played again get the moves they had."""
        self.pool, self.newest, self.elo = list(state["pool"]), state["newest"], state["elo"]
        self.ratings = {int(number): float(rating) for number, rating in state["ratings"]}
        self.selves = {}
        for number, learnt in state["selves"]:
            one = self.selves[number] = _frozen(self.policy)
            one.restore(learnt)
            for name, parameter in one.named_parameters_to_train():
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
        drawn = self._rngs[game].random()
        if self._replayed is None:
            self.playing[game], self._moves[game] = self._opponent(drawn), []
        else:
            self._replayed[game] = 0

    def _opponent(self, drawn: float) -> int:
        """Whom a game meets, by one number drawn uniformly from [0, 1)."""
        newest, random = self.settings.latest, self.settings.random
        if drawn < random:
            return RANDOM
        if drawn < random + newest or not self.pool:
            return self.newest
        share = (drawn - random - newest) / (1.0 - random - newest)
        return self.pool[min(int(share * len(self.pool)), len(self.pool) - 1)]

    def _again(self, masks: NDArray[np.bool_], indices: NDArray[Any]) -> NDArray[Any]:
        """The moves that were played. A game that only waits to be begun again (`Vector.restore`) gets any legal one."""
        assert self._replayed is not None
        actions = masks.argmax(1)
        for row, i in enumerate(indices.tolist()):
            moves, at = self._moves[i], self._replayed[i]
            if at < len(moves) and masks[row, moves[at]]:
                actions[row] = moves[at]
            self._replayed[i] += 1
        return np.asarray(actions)


def thinned(numbers: list[int], size: int) -> list[int]:
    """`numbers` (rising) without those that crowd most, down to `size`: self-play goes in circles, and selves spread over
    the whole past are what keeps it from forgetting. The newest stays, and so does the oldest where there is room for two.
    """
    while len(numbers) > size:
        inner = range(1, len(numbers) - 1)
        crowded = min(inner, key=lambda k: numbers[k + 1] - numbers[k - 1]) if size > 1 else 0
        numbers = numbers[:crowded] + numbers[crowded + 1 :]
    return numbers


def elo_gain(rating: float, other: float, score: float) -> float:
    """What a player's rating gains, and the other's loses, by a game of this score (1 won, ½ drawn, 0 lost)."""
    expected: float = 1.0 / (1.0 + 10.0 ** ((other - rating) / 400.0))
    return ELO_STEP * (score - expected)


def _frozen(policy: ActingPolicy) -> ActingPolicy:
    one = copy.deepcopy(policy)
    for _, parameter in one.named_parameters_to_train():
        parameter.grad = None
    return one

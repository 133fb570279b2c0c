"""Two-player board games as one learning player sees them: the opponent is part of the environment."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from surefoot.data.user_code import Guard
from surefoot.envs.gym import Vector
from surefoot.errors import InputError

if TYPE_CHECKING:
    from pettingzoo import AECEnv  # type: ignore

Array: TypeAlias = NDArray[Any]
Observations: TypeAlias = dict[str, Array]
GameMaker: TypeAlias = "Callable[..., AECEnv]"
Opponents: TypeAlias = Callable[[Observations, Array], Array]
"""From the observations {"observation": [M, ...], "action_mask": [M, n]} of the games in which the
opponent moves, and the indices [M] of those games, to one legal action for each [M]."""


def game_factory(name: str, **kwargs: Any) -> GameMaker:
    """What makes one game of PettingZoo's registry: `game_factory("classic/go-v5", board_size=5, komi=0.5)`.

    Without PettingZoo's checking wrappers: `GameVectorEnv` checks every move itself, up to three times as
    fast. A process can hold Go boards of one size only: PettingZoo keeps the size in a global. Raises
    InputError for an unknown game, a missing library, or a wrong argument.
    """

    def make() -> "AECEnv":
        try:
            from pettingzoo import make as make_env  # type: ignore
            from pettingzoo.env_registry.exceptions import PettingZooRegistryError  # type: ignore
        except ImportError as error:
            raise InputError(f"game {name!r}: {error}; pip install 'pettingzoo>=1.27' pygame-ce") from error
        try:
            return make_env("aec", name, **kwargs).unwrapped
        except (PettingZooRegistryError, ImportError, TypeError, ValueError) as error:
            reason = str(error).partition(" Available")[0]  # without the list of all environments
            raise InputError(f"game {name!r} with {kwargs}: {reason}") from error

    return make


def random_opponent(rngs: Sequence[np.random.Generator]) -> Opponents:
    """Plays uniformly over the legal moves; game i draws from rngs[i], whatever else is in the batch."""

    def choose(observations: Observations, indices: Array) -> Array:
        masks = observations["action_mask"].astype(bool)
        draws = np.array([rngs[i].random() for i in indices])
        nth = (draws * masks.sum(axis=1)).astype(np.int64)
        return np.asarray((masks.cumsum(axis=1) > nth[:, None]).argmax(axis=1))

    return choose


def make_games(make: "GameMaker | str", *, n_envs: int, kwargs: Mapping[str, Any], seed: int) -> Vector:
    """`n_envs` games of PettingZoo's id, or of what a function makes; `max_moves` is `GameVectorEnv`'s."""
    rest = {name: value for name, value in kwargs.items() if name != "max_moves"}
    maker = game_factory(make, **rest) if isinstance(make, str) else functools.partial(make, **rest)
    with Guard(f"game {make if isinstance(make, str) else getattr(make, '__name__', '')}", "cannot be made:"):
        games = GameVectorEnv(maker, n_envs, max_moves=kwargs.get("max_moves"))
    return Vector(games, seed=seed)


class GameVectorEnv(VectorEnv[Observations, Array, Array]):
    """N two-player PettingZoo AEC games; a step is the learner's move and the opponents' reply.

    The learner's seat alternates: episode k of game i has seat (i + k) % 2, where 0 moves first. One begun
    from a seed has seat seed % 2 instead, so that its seed and the learner's actions repeat it exactly; the
    next unseeded one alternates. `opponents` may be replaced at any time; those that draw from `rngs[i]`
    alone are repeated too.

    Observations are {"observation": float32 [N, ...], "action_mask": int8 [N, n]}, both from the learner's
    side. A game that is over stays so until `reset` (autoreset is disabled), and its mask is all ones.

    `max_moves` counts the moves of both players; a game that has had that many is truncated when it is the
    learner's turn, so that the value of the last observation can be bootstrapped. Go needs it: PettingZoo's
    forbids just the simple ko and ends only by two passes in a row. Raises InputError for a game of another
    kind, an illegal action, or a mask without a legal move.
    """

    def __init__(
        self,
        make: GameMaker,
        num_envs: int,
        *,
        opponents: Opponents | None = None,
        max_moves: int | None = None,
    ):
        if num_envs < 1 or (max_moves is not None and max_moves < 2):
            raise InputError(f"games need num_envs >= 1 and max_moves >= 2, got {num_envs} and {max_moves}")
        self.num_envs, self.max_moves = num_envs, max_moves
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self._games = [make() for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = _spaces(self._games[0])
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self.opponents = opponents or random_opponent(self.rngs)
        self.seats = 1 - np.arange(num_envs) % 2  # the learner's, int [N]; the first reset swaps them
        self._observations: Observations = {
            name: np.zeros((num_envs, *(space.shape or ())), space.dtype)
            for name, space in self.single_observation_space.items()
        }
        self._moves = np.zeros(num_envs, dtype=np.int64)
        self._rewards = np.zeros(num_envs)  # the learner's, since its last step
        self._returns = np.zeros(num_envs)  # the learner's, since the start of its episode
        self._terminated = np.ones(num_envs, dtype=bool)  # so that a step before the first reset is refused
        self._truncated = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start the next episode in the games of options["reset_mask"] (bool [N]; all of them without it).

        Game i is seeded by seed[i], or by seed + i where `seed` is one number.
        """
        chosen = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if chosen.shape != (self.num_envs,) or chosen.dtype != np.bool_:
            got = f"{chosen.dtype} of shape {chosen.shape}"
            raise InputError(f"reset_mask: expected bool of shape ({self.num_envs},), got {got}")
        if seed is None or isinstance(seed, (int, np.integer)):
            seed = [None if seed is None else seed + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise InputError(f"reset: {len(seed)} seeds for {self.num_envs} games; give one each or a number")
        for per_game in (self._moves, self._rewards, self._returns, self._terminated, self._truncated):
            per_game[chosen] = 0
        for i in np.flatnonzero(chosen).tolist():
            game_seed = seed[i]
            self.seats[i] = 1 - self.seats[i] if game_seed is None else game_seed % 2
            if game_seed is not None:  # another stream than the one the game may draw from
                self.rngs[i] = np.random.default_rng([game_seed, 1])
            self._games[i].reset(seed=game_seed)
        self._reply(np.flatnonzero(chosen))
        return self._views(), {}

    def step(self, actions: Array) -> tuple[Observations, Array, Array, Array, dict[str, Any]]:
        """Make the learner's moves [N], then the opponents', until each game is over or the learner's turn.

        Rewards float64 [N] are the learner's, over its move and the reply. Where a game has ended, infos hold
        "seat" and "outcome" (1 won, 0 drawn or truncated, -1 lost) int [N], valid where "_seat" and
        "_outcome" are true; and "opponent" alike where `opponents` has the numbers of those `playing`.
        """
        if (over := self._terminated | self._truncated).any():
            raise InputError(f"games {np.flatnonzero(over).tolist()} are over: reset them first")
        everyone = np.arange(self.num_envs)
        self._play("learner", everyone, np.asarray(actions))
        self._reply(everyone)
        rewards = self._rewards.copy()
        self._rewards[:] = 0
        return self._views(), rewards, self._terminated.copy(), self._truncated.copy(), self._infos()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the games."""
        for game in self._games:
            game.close()

    def _reply(self, indices: Array) -> None:
        """Let the opponents move, one batch a round, until it is the learner's turn; then observe."""
        waiting = self._waiting(indices)
        while len(waiting):
            for i in waiting:
                self._observe(i, self._games[i].agent_selection)
            self._play("opponent", waiting, np.asarray(self.opponents(self._views(waiting), waiting)))
            waiting = self._waiting(waiting)
        for i in indices:
            self._observe(i, self._learner(i))
        if self.max_moves is not None:
            self._truncated[indices] |= (self._moves >= self.max_moves)[indices] & ~self._terminated[indices]

    def _play(self, player: str, indices: Array, actions: Array) -> None:
        """One move in each of these games; none is made unless all are legal."""
        if actions.shape != indices.shape or actions.dtype.kind not in "iu":
            got = f"{actions.dtype} of shape {actions.shape}"
            raise InputError(f"{player}: expected {len(indices)} whole-numbered actions, got {got}")
        masks = self._observations["action_mask"][indices]
        for i, action, mask in zip(indices.tolist(), actions.tolist(), masks, strict=True):
            if not 0 <= action < len(mask) or not mask[action]:
                where = f"is illegal in game {i}; legal there: {np.flatnonzero(mask).tolist()}"
                raise InputError(f"{player}: action {action} {where}")
        for i, action in zip(indices.tolist(), actions.tolist(), strict=True):
            game, learner = self._games[i], self._learner(i)
            game.step(action)
            self._moves[i] += 1
            self._rewards[i] += game.rewards[learner]
            self._returns[i] += game.rewards[learner]
            self._terminated[i] = game.terminations[learner]
            self._truncated[i] = game.truncations[learner]

    def _waiting(self, indices: Array) -> Array:
        """Those of these games that go on and in which it is the opponent's turn."""
        over = self._terminated | self._truncated
        return indices[[not over[i] and self._games[i].agent_selection != self._learner(i) for i in indices]]

    def _observe(self, index: int, agent: str) -> None:
        """Take what this player sees of a game into the buffers."""
        view = self._games[index].observe(agent)
        mask = self._observations["action_mask"][index]
        self._observations["observation"][index] = view["observation"]
        mask[:] = 1 if self._terminated[index] or self._truncated[index] else view["action_mask"]
        if not mask.any():
            raise InputError(f"game {index}: {agent} is to move but its action_mask has no legal move")

    def _views(self, indices: Array | slice = slice(None)) -> Observations:
        return {name: values[indices].copy() for name, values in self._observations.items()}

    def _infos(self) -> dict[str, Any]:
        ended = self._terminated | self._truncated
        if not ended.any():
            return {}
        outcomes = np.where(self._terminated, np.sign(self._returns), 0).astype(np.int64)
        infos = {"seat": self.seats.copy(), "_seat": ended, "outcome": outcomes, "_outcome": ended.copy()}
        if (playing := getattr(self.opponents, "playing", None)) is not None:
            infos |= {"opponent": playing.copy(), "_opponent": ended.copy()}
        return infos

    def _learner(self, index: int) -> str:
        return str(self._games[index].possible_agents[self.seats[index]])


def _spaces(game: "AECEnv") -> tuple[spaces.Dict, spaces.Discrete]:
    """The learner's observation and action space; both players must have the same."""
    if not hasattr(game, "last") or not getattr(game, "possible_agents", None):
        need = "an AECEnv of PettingZoo that names its possible_agents, of which two take turns"
        how = "leave env.self_play out for a gymnasium.Env; a ParallelEnv becomes one by parallel_to_aec"
        raise InputError(f"game: expected {need}, got {type(game).__name__}; {how}")
    kinds = [(game.observation_space(a), game.action_space(a)) for a in game.possible_agents]
    view, actions = kinds[0]
    board = view.spaces.get("observation") if isinstance(view, spaces.Dict) else None
    is_counted = isinstance(actions, spaces.Discrete) and actions.start == 0
    if len(kinds) != 2 or kinds[0] != kinds[1] or not isinstance(board, spaces.Box) or not is_counted:
        need = "two players, observation (a Box) and action_mask the same for both, actions Discrete(n)"
        raise InputError(f"game {game}: expected {need}; it has {len(kinds)} players, {view} and {actions}")
    observed = spaces.Box(board.low.astype(np.float32), board.high.astype(np.float32), dtype=np.float32)
    n = int(actions.n)
    return spaces.Dict({"observation": observed, "action_mask": spaces.MultiBinary(n)}), spaces.Discrete(n)

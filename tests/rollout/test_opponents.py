"""The opponent pool: who meets whom in self-play, their Elo, and that a resumed run meets the same opponents."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from surefoot import PPO
from surefoot.config import SelfPlayConfig

pytest.importorskip("pettingzoo")

from surefoot.envs.games import GameVectorEnv, game_factory
from surefoot.envs.gym import Vector
from surefoot.envs.observations import leaves
from surefoot.policies.control.policy import ControlPolicy
from surefoot.rollout.gym import run_episodes
from surefoot.rollout.opponents import ELO_STEP, RANDOM, OpponentPool, elo_gain, thinned
from surefoot.types import Episode
from tests.inputs import refusal

pytestmark = pytest.mark.usefixtures("in_own_folder")
TICTACTOE = game_factory("classic/tictactoe-v3")
SMALL: dict[str, Any] = {"n_envs": 8, "n_steps": 16, "batch_size": 32, "n_epochs": 1, "learning_rate": 0.01, "seed": 3}
SMALL |= {"device": "cpu", "verbose": 0, "run_checkpoint_every": 2, "evaluate_episodes": 0}


def pool_of(games: int, kind: str = "MlpPolicy", **settings: Any) -> tuple[OpponentPool, GameVectorEnv]:
    env = GameVectorEnv(TICTACTOE, games)
    policy = ControlPolicy(leaves(env.single_observation_space), env.single_action_space, kind=kind)
    return OpponentPool(policy, env, SelfPlayConfig(**settings)), env


def changed(opponents: OpponentPool) -> None:
    with torch.no_grad():
        for _, parameter in opponents.policy.named_parameters_to_train():
            parameter.add_(1.0)


def finished(*games: tuple[int, int]) -> list[Episode]:
    return [Episode(float(won), 3, False, {"outcome": float(won), "opponent": float(opponent)}) for won, opponent in games]


def any_legal(views: dict[str, np.ndarray]) -> np.ndarray:
    return views["action_mask"].argmax(1)


# Whose share is how much; a pool of one share alone, and of a run that has none yet.
LATEST, AT_RANDOM, NEITHER = {"latest": 1.0, "random": 0.0}, {"latest": 0.0, "random": 1.0}, {"latest": 0.0, "random": 0.0}
SHARES: list[tuple[dict[str, Any], list[int], dict[int, float]]] = [
    ({"latest": 0.5, "random": 0.2, "snapshot_every": 1, "pool_size": 3}, [0, 1, 2], {RANDOM: 0.2, 0: 0.1, 1: 0.1, 2: 0.6}),
    (LATEST, [0, 7], {7: 1.0}),
    (AT_RANDOM, [0, 7], {RANDOM: 1.0}),
    (NEITHER, [0, 7], {0: 1.0}),
    (NEITHER, [7], {7: 1.0}),
]


@pytest.mark.parametrize(("settings", "versions", "expected"), SHARES)
def test_games_are_shared_out_as_asked(settings: dict[str, Any], versions: list[int], expected: dict[int, float]) -> None:
    opponents, env = pool_of(1_000, **{"snapshot_every": 10, **settings})
    for version in versions:
        opponents.begin(version)
    views, _ = env.reset(seed=0)
    env.step(any_legal(views))
    found = Counter(opponents.playing.tolist())
    assert found.keys() == expected.keys()
    assert all(abs(found[opponent] / 1_000 - share) < 4 * (share / 1_000) ** 0.5 for opponent, share in expected.items())


def test_a_random_move_probability_of_one_is_the_random_player() -> None:
    def moves(**settings: Any) -> list[list[int]]:
        opponents, env = pool_of(40, **settings)
        with torch.no_grad():
            opponents.policy.head.linear.bias.copy_(torch.arange(9.0))  # it likes the last cell best
        opponents.begin(0)
        env.step(any_legal(env.reset(seed=5)[0]))
        return opponents._moves

    assert moves(**LATEST, random_move_prob=1.0) == moves(**AT_RANDOM) != moves(**LATEST)


def test_a_games_opponent_and_moves_follow_from_its_seed_alone() -> None:
    def played(games: int) -> tuple[int, list[int]]:
        opponents, env = pool_of(games, latest=0.3, random=0.3, snapshot_every=1)
        opponents.begin(0)
        changed(opponents)
        opponents.begin(1)
        views, _ = env.reset(seed=[11, *range(games - 1)])
        for _ in range(2):
            views, *_ = env.step(any_legal(views))
        return int(opponents.playing[0]), opponents._moves[0]

    assert played(1) == played(6)


def test_a_snapshot_stays_as_it_was_while_the_learner_learns() -> None:
    opponents, _ = pool_of(2, snapshot_every=1)
    opponents.begin(0)
    before = {name: value.clone() for name, value in opponents.tensors().items()}
    changed(opponents)
    after = opponents.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    opponents.begin(1)
    assert not any(torch.equal(opponents.tensors()[name.replace("0/", "1/", 1)], value) for name, value in before.items())


def test_a_game_keeps_its_opponent_when_a_newer_snapshot_comes() -> None:
    opponents, env = pool_of(20, **LATEST, snapshot_every=100)
    opponents.begin(1)
    views, *_ = env.step(any_legal(env.reset(seed=0)[0]))
    opponents.begin(2)
    env.step(any_legal(views))
    assert set(opponents.playing.tolist()) == {1} and opponents.snapshots.keys() == {1, 2}
    opponents.playing[:] = 2
    opponents.begin(3)
    assert opponents.snapshots.keys() == {2, 3}, "what no game needs any more is let go"


def test_the_pool_keeps_snapshots_of_the_whole_past() -> None:
    pool: list[int] = []
    for version in range(0, 1_001, 10):
        pool = thinned([*pool, version], 5)
        assert pool[-1] == version and pool[0] == 0 and len(pool) <= 5
        if len(pool) == 5:
            assert max(np.diff(pool)) <= max(10, 0.62 * version)
    assert thinned([1, 2, 3], 1) == [3] and thinned([1, 2], 2) == [1, 2]


def test_elo_is_zero_sum_and_equals_stay() -> None:
    assert (elo_gain(100.0, 100.0, 0.5), elo_gain(100.0, 100.0, 1.0)) == (0.0, ELO_STEP / 2)
    for score in (0.0, 0.5, 1.0):
        assert elo_gain(300.0, 120.0, score) == pytest.approx(-elo_gain(120.0, 300.0, 1.0 - score))
    assert elo_gain(400.0, 0.0, 10 / 11) == pytest.approx(0.0), "400 points are odds of ten to one"


def test_ratings_move_by_rated_games_and_the_random_player_is_the_anchor() -> None:
    opponents, _ = pool_of(2, snapshot_every=1)
    opponents.begin(0)
    opponents.begin(1)
    metrics = opponents.count(finished((1, 0), (-1, 0), (0, 0), (1, 1), (1, 99)))
    assert opponents.elo + opponents.ratings[0] == pytest.approx(0.0) and opponents.elo != 0.0
    assert opponents.ratings[1] == 0.0, "the latest is the learner"
    assert metrics == {"selfplay/games": 5.0, "selfplay/elo": opponents.elo, "selfplay/win_rate": 0.7}
    before = opponents.elo
    opponents.count(finished((1, RANDOM)))
    assert opponents.elo > before and opponents.ratings[RANDOM] == 0.0
    opponents.begin(2)
    assert opponents.ratings[2] == opponents.elo, "a new snapshot is as good as the learner"
    assert opponents.count([]) == {"selfplay/games": 0.0, "selfplay/elo": opponents.elo}
    wins = np.random.default_rng(0).random(4_000) < 10 / 11
    opponents.count(finished(*((1 if won else -1, RANDOM) for won in wins)))
    assert opponents.elo == pytest.approx(400.0, abs=60.0), "the better player is found"


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_games_under_way_are_restored_with_their_opponents(steps: int) -> None:
    pools = [pool_of(12, latest=0.4, random=0.2, random_move_prob=0.3, snapshot_every=1) for _ in range(2)]
    (opponents, other), (games, again) = [pool for pool, _ in pools], [Vector(env, seed=4) for _, env in pools]
    opponents.begin(0)
    views = games.reset()
    changed(opponents)
    opponents.begin(1)
    for _ in range(steps):
        views = games.step(any_legal(views)).observations
    other.restore(opponents.state(), opponents.tensors())
    found = again.restore(games.state())
    other.go_on()
    assert found is not None
    for _ in range(12):
        assert all(np.array_equal(values, found[name]) for name, values in views.items())
        playing, step = opponents.playing.copy(), games.step(any_legal(views))
        assert not step.ended.any() or np.array_equal(step.infos["opponent"][step.ended], playing[step.ended])
        views, found = step.observations, again.step(any_legal(found)).observations
    assert opponents.state() == other.state()


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("MlpLstmPolicy", "tictactoe", {}, "policy.model"),
    ("MlpPolicy", "tictactoe", {"vectorization": "async"}, "env.vectorization"),
    ("MlpPolicy", "tictactoe", {"self_play": {"latest": 0.7, "random": 0.7}}, "env.self_play"),
    ("MlpPolicy", "tictactoes", {}, "tictactoes"),
]


@pytest.mark.parametrize(("policy", "env", "settings", "named"), REFUSED)
def test_what_cannot_be_played_is_refused(policy: str, env: str, settings: dict[str, Any], named: str) -> None:
    refusal(lambda: PPO(policy, f"classic/{env}-v3", **SMALL, **settings).learn(128), named)


def test_tictactoe_is_learned_against_a_random_player() -> None:
    settings = SMALL | {"n_envs": 64, "n_steps": 32, "batch_size": 256, "n_epochs": 4, "learning_rate": 2e-3, "ent_coef": 0.01}
    model = PPO("MlpPolicy", "classic/tictactoe-v3", **settings, self_play=AT_RANDOM).learn(32_000)
    games = run_episodes(model.policy, Vector(GameVectorEnv(TICTACTOE, 100), seed=0), 500)
    assert sum(game.total for game in games) / 500 > 0.7  # random play has mean 0 over both seats

"""Who meets whom in self-play, what they are worth, and that a resumed run meets the same opponents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surefoot import PPO
from surefoot.config import SelfPlayConfig
from surefoot.errors import InputError

pytest.importorskip("pettingzoo")

from surefoot.envs.games import GameVectorEnv, game_factory
from surefoot.envs.gym import Vector
from surefoot.envs.observations import leaves
from surefoot.policies.control.policy import ControlPolicy
from surefoot.rollout.opponents import ELO_STEP, RANDOM, OpponentPool, elo_gain, thinned
from surefoot.types import Episode
from tests.train.small_run import rows, weights

TICTACTOE = game_factory("classic/tictactoe-v3")
SMALL: dict[str, Any] = {
    "n_envs": 8,
    "n_steps": 16,
    "batch_size": 32,
    "n_epochs": 1,
    "learning_rate": 0.01,
    "seed": 3,
    "device": "cpu",
    "verbose": 0,
    "run_checkpoint_every": 2,
    "evaluate_episodes": 0,
}
BATCH = 8 * 16


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def league_of(games: int, kind: str = "MlpPolicy", **settings: Any) -> tuple[OpponentPool, GameVectorEnv]:
    env = GameVectorEnv(TICTACTOE, games)
    policy = ControlPolicy(leaves(env.single_observation_space), env.single_action_space, kind=kind)
    return OpponentPool(policy, env, SelfPlayConfig(**settings)), env


def changed(league: OpponentPool) -> None:
    with torch.no_grad():
        for _, parameter in league.policy.named_parameters_to_train():
            parameter.add_(1.0)


def finished(outcome: int, opponent: int) -> Episode:
    return Episode(float(outcome), 3, False, {"outcome": float(outcome), "opponent": float(opponent)})


def any_legal(views: dict[str, np.ndarray]) -> np.ndarray:
    return views["action_mask"].argmax(1)


def met(league: OpponentPool, env: GameVectorEnv) -> Counter[int]:
    """Whom the games of new episodes are against, once each learner has moved."""
    views, _ = env.reset(seed=0)
    env.step(any_legal(views))
    return Counter(league.playing.tolist())


def test_games_are_shared_out_as_asked() -> None:
    league, env = league_of(1_000, latest=0.5, random=0.2, snapshot_every=1, pool_size=3)
    for version in range(3):
        league.begin(version)
    shares = {opponent: count / 1_000 for opponent, count in met(league, env).items()}
    assert league.pool == [0, 1, 2]
    expected = {RANDOM: 0.2, 0: 0.1, 1: 0.1, 2: 0.5 + 0.1}  # the newest has just joined the pool, too
    assert shares.keys() == expected.keys()
    assert all(abs(shares[opponent] - share) < 4 * (share / 1_000) ** 0.5 for opponent, share in expected.items())


@pytest.mark.parametrize(("shares", "opponent"), [((1.0, 0.0), 7), ((0.0, 1.0), RANDOM), ((0.0, 0.0), 0)])
def test_a_share_of_one_is_all_games(shares: tuple[float, float], opponent: int) -> None:
    league, env = league_of(50, latest=shares[0], random=shares[1], snapshot_every=10)
    league.begin(0)
    league.begin(7)
    assert met(league, env) == {opponent: 50}


def test_a_self_that_blunders_always_plays_like_the_random_player() -> None:
    def moves(**settings: Any) -> list[list[int]]:
        league, env = league_of(40, **settings)
        with torch.no_grad():
            league.policy.head.linear.bias.copy_(torch.arange(9.0))  # it likes the last cell best
        league.begin(0)
        views, _ = env.reset(seed=5)
        env.step(any_legal(views))
        return league._moves

    assert moves(latest=1.0, random=0.0, random_move_prob=1.0) == moves(latest=0.0, random=1.0)
    assert moves(latest=1.0, random=0.0, random_move_prob=1.0) != moves(latest=1.0, random=0.0)


def test_without_past_selves_the_newest_takes_their_share() -> None:
    league, env = league_of(50, latest=0.0, random=0.0, snapshot_every=10)
    league.begin(7)  # a run whose pool is still empty
    assert met(league, env) == {7: 50}


def test_whom_a_game_meets_and_what_is_played_follow_from_its_seed_alone() -> None:
    def played(games: int) -> tuple[int, list[int]]:
        league, env = league_of(games, latest=0.3, random=0.3, snapshot_every=1)
        league.begin(0)
        changed(league)
        league.begin(1)
        views, _ = env.reset(seed=[11, *range(games - 1)])
        for _ in range(2):
            views, *_ = env.step(any_legal(views))
        return int(league.playing[0]), league._moves[0]

    assert played(1) == played(6)


def test_a_self_stays_as_it_was_while_the_learner_learns() -> None:
    league, _ = league_of(2, snapshot_every=1)
    league.begin(0)
    before = {name: value.clone() for name, value in league.tensors().items()}
    changed(league)
    after = league.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    league.begin(1)
    assert not any(torch.equal(league.tensors()[name.replace("0/", "1/", 1)], value) for name, value in before.items())


def test_a_game_keeps_its_opponent_when_a_newer_self_comes() -> None:
    league, env = league_of(20, latest=1.0, random=0.0, snapshot_every=100)
    league.begin(1)
    views, _ = env.reset(seed=0)
    views, *_ = env.step(any_legal(views))
    league.begin(2)
    env.step(any_legal(views))
    assert set(league.playing.tolist()) == {1} and league.snapshots.keys() == {1, 2}
    league.playing[:] = 2
    league.begin(3)
    assert league.snapshots.keys() == {2, 3}, "a self whom nobody meets any more is let go"


def test_the_pool_keeps_selves_from_the_whole_past() -> None:
    pool: list[int] = []
    for version in range(0, 1_001, 10):
        pool = thinned([*pool, version], 5)
        assert pool[-1] == version and pool[0] == 0 and len(pool) <= 5
        if len(pool) == 5:
            assert max(np.diff(pool)) <= max(10, 0.62 * version)
    assert thinned([1, 2, 3], 1) == [3] and thinned([1, 2], 2) == [1, 2]


def test_elo_is_zero_sum_and_equals_stay() -> None:
    assert elo_gain(100.0, 100.0, 0.5) == 0.0
    assert elo_gain(100.0, 100.0, 1.0) == ELO_STEP / 2
    for score in (0.0, 0.5, 1.0):
        assert elo_gain(300.0, 120.0, score) == pytest.approx(-elo_gain(120.0, 300.0, 1.0 - score))
    assert elo_gain(400.0, 0.0, 10 / 11) == pytest.approx(0.0), "400 points are odds of ten to one"


def test_ratings_move_by_rated_games_and_the_random_player_is_the_anchor() -> None:
    league, _ = league_of(2, snapshot_every=1)
    league.begin(0)
    league.begin(1)
    metrics = league.count([finished(1, 0), finished(-1, 0), finished(0, 0), finished(1, 1), finished(1, 99)])
    assert league.elo + league.ratings[0] == pytest.approx(0.0) and league.elo != 0.0
    assert league.ratings[1] == 0.0, "the newest self is the learner"
    assert metrics == {"selfplay/games": 5.0, "selfplay/elo": league.elo, "selfplay/win_rate": 0.7}
    before = league.elo
    league.count([finished(1, RANDOM)])
    assert league.elo > before and league.ratings[RANDOM] == 0.0
    league.begin(2)
    assert league.ratings[2] == league.elo, "a new past self is as good as the learner"
    assert league.count([]) == {"selfplay/games": 0.0, "selfplay/elo": league.elo}


def test_elo_finds_how_much_better_a_player_is() -> None:
    league, _ = league_of(2)
    league.begin(0)
    wins = np.random.default_rng(0).random(4_000) < 10 / 11
    league.count([finished(1 if won else -1, RANDOM) for won in wins])
    assert league.elo == pytest.approx(400.0, abs=60.0)


def test_against_itself_what_one_seat_wins_the_other_loses() -> None:
    league, env = league_of(400, latest=1.0, random=0.0)
    league.begin(0)
    views, _ = env.reset(seed=0)
    outcomes = np.full(400, 9)
    generator = torch.Generator().manual_seed(1)
    seats = env.seats.copy()
    while (outcomes == 9).any():
        noise = league.policy.noise(1, 400, generator)[0]
        starts = torch.zeros(400, dtype=torch.bool)
        actions, _ = league.policy.act(league.policy.prepare(views), {}, episode_starts=starts, noise=noise)
        views, rewards, ended, _, infos = env.step(actions.numpy())
        if ended.any():
            assert np.array_equal(infos["opponent"], np.zeros(400))
            new = ended & (outcomes == 9)
            outcomes[new] = rewards[new]
            views, _ = env.reset(seed=[int(i) if over else None for i, over in enumerate(ended)], options={"reset_mask": ended})
    first, second = outcomes[seats == 0], outcomes[seats == 1]
    assert abs(first.mean() + second.mean()) < 4 * (2 / 200) ** 0.5
    assert first.mean() > 0.1, "to move first is worth something"


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_games_under_way_are_found_again_with_their_opponents(steps: int) -> None:
    league, env = league_of(12, latest=0.4, random=0.2, random_move_prob=0.3, snapshot_every=1)
    games = Vector(env, seed=4)
    league.begin(0)
    views = games.reset()
    changed(league)
    league.begin(1)
    for _ in range(steps):
        views = games.step(any_legal(views)).observations
    state, tensors, vector = league.state(), league.tensors(), games.state()

    other, fresh = league_of(12, latest=0.4, random=0.2, random_move_prob=0.3, snapshot_every=1)
    again = Vector(fresh, seed=4)
    other.restore(state, tensors)
    found = again.restore(vector)
    other.go_on()
    assert found is not None
    for _ in range(12):
        assert all(np.array_equal(values, found[name]) for name, values in views.items())
        views, found = games.step(any_legal(views)).observations, again.step(any_legal(found)).observations
    assert league.state() == other.state()


def test_a_run_of_self_play_that_was_ended_goes_on_bit_for_bit() -> None:
    settings = {
        **SMALL,
        "self_play": {"latest": 0.4, "random": 0.2, "random_move_prob": 0.1, "snapshot_every": 1, "pool_size": 2},
    }
    whole = PPO("MlpPolicy", "classic/tictactoe-v3", run_name="whole", **settings).learn(7 * BATCH)
    left = iter(range(3 * 16 + 7))  # in the rollout after update 3
    ended = PPO("MlpPolicy", "classic/tictactoe-v3", run_name="ended", **settings)
    ended.learn(7 * BATCH, callback=lambda locals_, globals_: next(left, None) is not None)
    assert not ended.is_finished
    resumed = PPO.load("runs/ended", verbose=0).learn()
    assert resumed.is_finished
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert rows(Path("runs/whole")) == rows(Path("runs/ended"))
    assert {"selfplay/elo", "selfplay/games", "selfplay/win_rate"} <= rows(Path("runs/whole"))[-1].keys()
    assert Path("runs/whole/samples.jsonl").read_text() == Path("runs/ended/samples.jsonl").read_text() != ""


@pytest.mark.parametrize(
    ("policy", "env", "settings", "said"),
    [
        ("MlpLstmPolicy", "classic/tictactoe-v3", {}, "without an LSTM"),
        ("MlpPolicy", "classic/tictactoe-v3", {"vectorization": "async"}, "stepped in one process"),
        ("MlpPolicy", "classic/tictactoe-v3", {"self_play": {"latest": 0.7, "random": 0.7}}, "add up to over 1"),
        ("MlpPolicy", "classic/tictactoes-v3", {}, "tictactoes"),
    ],
)
def test_what_cannot_be_played_is_said_in_a_line(policy: str, env: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        PPO(policy, env, **{**SMALL, "batch_size": BATCH, **settings}).learn(BATCH)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_tictactoe_is_learnt_against_a_random_player() -> None:
    model = PPO(
        "MlpPolicy",
        "classic/tictactoe-v3",
        **{**SMALL, "n_envs": 64, "n_steps": 32, "batch_size": 256, "n_epochs": 4, "learning_rate": 2e-3},
        ent_coef=0.01,
        self_play={"latest": 0.0, "random": 1.0},
    )
    model.learn(32_000)
    env = GameVectorEnv(TICTACTOE, 500)
    views, _ = env.reset(seed=[2 * i for i in range(500)])  # an even seed moves first
    total = np.zeros(500)
    over = np.zeros(500, dtype=bool)
    while not over.all():
        actions, _ = model.predict(views, deterministic=True)
        views, rewards, ended, _, _ = env.step(np.where(over, any_legal(views), actions))
        total += np.where(over, 0.0, rewards)
        over |= ended
        if ended.any():
            views, _ = env.reset(seed=[0] * 500, options={"reset_mask": ended})
    assert total.mean() > 0.9

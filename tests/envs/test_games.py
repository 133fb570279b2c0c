import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from surefoot.errors import InputError
from tests.golden import refused
from tests.recipes import go_gtp
from tests.recipes import tictactoe as oracle

pytest.importorskip("gymnasium")
pytest.importorskip("pettingzoo")

import gymnasium
from gymnasium.vector import AutoresetMode

from surefoot.envs.games import GameVectorEnv, game_factory, random_opponent

Views = dict[str, np.ndarray]
TICTACTOE = game_factory("classic/tictactoe-v3")


def one_game(replies: list[int], make: Any = TICTACTOE) -> GameVectorEnv:
    """A game whose opponent plays these moves in this order."""
    left = iter(replies)
    env = GameVectorEnv(make, 1, opponents=lambda views, indices: np.array([next(left)]))
    env.reset(seed=0)
    return env


def go(komi: float) -> Any:
    return game_factory("classic/go-v5", board_size=5, komi=komi)


def lowest(views: Views, indices: np.ndarray) -> np.ndarray:
    """Each game's first legal move."""
    return views["action_mask"].argmax(axis=1)


def play(env: GameVectorEnv, actions: list[int]) -> list[tuple[float, bool, dict[str, Any]]]:
    """One game's learner plays these; its rewards, ends and infos."""
    steps = [env.step(np.array([action])) for action in actions]
    return [(float(rewards[0]), bool(terminated[0]), infos) for _, rewards, terminated, _, infos in steps]


def test_random_games_end_as_often_as_enumeration_says():
    games = 4_000
    env = GameVectorEnv(TICTACTOE, games)
    learner, everyone = random_opponent([np.random.default_rng(i) for i in range(games)]), np.arange(games)
    views, _ = env.reset(seed=7)
    seats, outcomes = env.seats.copy(), np.full(games, 9)
    while (outcomes == 9).any():
        views, rewards, terminated, truncated, infos = env.step(learner(views, everyone))
        assert not truncated.any()
        if terminated.any():
            assert np.array_equal(rewards[terminated], infos["outcome"][terminated])
            outcomes = np.where(terminated & (outcomes == 9), infos["outcome"], outcomes)
            views, _ = env.reset(options={"reset_mask": terminated})
    as_x = np.where(seats == 0, outcomes, -outcomes)
    for outcome, chance in zip((1, -1, 0), oracle.random_play(), strict=True):
        assert abs((as_x == outcome).mean() - chance) < 4 * (chance * (1 - chance) / games) ** 0.5


def test_spaces_and_views_are_the_board_as_the_learner_sees_it():
    env = GameVectorEnv(TICTACTOE, 2, opponents=lambda views, indices: np.full(len(indices), 5))
    views, infos = env.reset(seed=0)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert env.observation_space.contains(views) and infos == {} and env.single_action_space.n == 9
    assert views["observation"][0].sum() == 0 and views["action_mask"][0].sum() == 9  # the learner opens
    assert oracle.board_of(views["observation"][1]) == (0, 0, 0, 0, 0, 1, 0, 0, 0)  # the opponent has
    env.opponents = lambda views, indices: np.array([5, 4])
    views = env.step(np.array([1, 0]))[0]
    assert oracle.board_of(views["observation"][0]) == (0, 1, 0, 0, 0, 2, 0, 0, 0)
    assert views["action_mask"][0].tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1]


ENDS = [([3, 4], [0, 1, 2], 1), ([3, 4, 5], [0, 1, 8], -1), ([1, 4, 5, 6], [0, 2, 7, 3, 8], 0)]


@pytest.mark.parametrize(("replies", "actions", "outcome"), ENDS, ids=["won before the reply", "lost by the reply", "drawn"])
def test_a_games_end(replies, actions, outcome):
    env = one_game(replies)
    *before, (reward, terminated, infos) = play(env, actions)
    assert all(step == (0.0, False, {}) for step in before)
    assert (reward, terminated, infos["seat"].tolist(), infos["outcome"].tolist()) == (outcome, True, [0], [outcome])
    assert env._views()["action_mask"].tolist() == [[1] * 9]
    with refused("games [0]"):  # until it is reset
        env.step(np.array([8]))


def test_seats_alternate_and_a_seed_decides_the_seat_so_that_it_repeats_the_episode():
    env = GameVectorEnv(TICTACTOE, 3, opponents=lowest)
    every, first, second = np.array([[True, True, True], [True, False, False], [False, True, False]])
    table = [(None, every, [0, 1, 0]), (None, every, [1, 0, 1]), (None, every, [0, 1, 0]), ([4, 7, 0], every, [0, 1, 0])]
    table += [([6, None, None], first, [0, 1, 0]), (None, every, [1, 0, 1])]
    for seed, mask, seats in table:
        views, _ = env.reset(seed=seed, options={"reset_mask": mask})
        assert env.seats.tolist() == seats
        assert views["observation"].sum(axis=(1, 2, 3)).tolist() == seats  # one mark is there in the second seat
    env.reset(seed=0)
    before = env.step(np.array([8, 8, 8]))[0]
    views, _ = env.reset(options={"reset_mask": second})  # the other games are left alone
    assert env.seats.tolist() == [0, 0, 0] and views["observation"][1].sum() == 0
    assert all(np.array_equal(views[name][[0, 2]], before[name][[0, 2]]) for name in views)


def test_a_game_follows_from_its_seed_alone():
    def games_of(env: GameVectorEnv, seed: int | list[int]) -> np.ndarray:
        views = [env.reset(seed=seed)[0]]
        for _ in range(2):
            views.append(env.step(lowest(views[-1], np.arange(env.num_envs)))[0])
        return np.stack([view["observation"] for view in views])

    env = GameVectorEnv(TICTACTOE, 16)
    first = games_of(env, 3)
    assert np.array_equal(first, games_of(env, 3)) and not np.array_equal(first, games_of(env, 100))
    assert np.array_equal(first, games_of(GameVectorEnv(TICTACTOE, 16), list(range(3, 19))))
    assert np.array_equal(first[:, :1], games_of(GameVectorEnv(TICTACTOE, 1), 3))


def test_opponents_are_asked_once_a_round_for_just_the_games_that_wait():
    asked: list[list[int]] = []

    def opponents(views: Views, indices: np.ndarray) -> np.ndarray:
        asked.append(indices.tolist())
        assert views["observation"].shape == (len(indices), 3, 3, 2)
        assert np.array_equal(views["action_mask"] == 0, views["observation"].any(axis=-1).reshape(-1, 9))
        marks = views["observation"].sum(axis=(1, 2))  # [M, 2]: the opponent's own, the learner's
        assert np.array_equal(marks[:, 1] - marks[:, 0], np.asarray(indices) % 2 == 0)
        return lowest(views, indices)

    env = GameVectorEnv(TICTACTOE, 4, opponents=opponents)
    env.reset(seed=0)
    env.step(np.array([8, 8, 8, 8]))
    assert asked == [[1, 3], [0, 1, 2, 3]]


ILLEGAL = [([9, 1], "action 9 is illegal in game 0"), ([0, -1], "action -1 is illegal in game 1")]
ILLEGAL += [([8, 0], "action 0 is illegal in game 1; legal there: [1, 2, 3, 4, 5, 6, 7, 8]")]
ILLEGAL += [([0], "2 whole-numbered actions"), ([0.0, 1.0], "got float64")]


def test_illegal_actions_are_refused_before_any_game_moves():
    env = GameVectorEnv(TICTACTOE, 2, opponents=lowest)
    env.reset(seed=0)
    for actions, named in ILLEGAL:
        with refused("learner", named):
            env.step(np.array(actions))
    env.step(np.array([8, 8]))  # neither game has moved, so 8 is still free in both


def test_an_illegal_opponent_and_a_view_without_a_legal_move_are_named(monkeypatch):
    with refused("opponent: action 4", "game 0"):
        one_game([4]).step(np.array([4]))
    game = TICTACTOE()
    monkeypatch.setattr(game, "observe", lambda agent: {"observation": 0, "action_mask": np.zeros(9, np.int8)})
    with refused("game 0: player_1", "action_mask"):
        one_game([], lambda: game)


def test_max_moves_cuts_a_game_off_on_the_learners_turn():
    env = GameVectorEnv(TICTACTOE, 2, opponents=lowest, max_moves=3)
    env.reset(seed=0)
    ends = []
    for actions in ([8, 8], [7, 7]):
        views, rewards, terminated, truncated, infos = env.step(np.array(actions))
        assert not terminated.any() and not rewards.any()
        ends.append(truncated.tolist())
        if truncated.any():
            env.reset(options={"reset_mask": truncated})
    assert ends == [[False, True], [True, False]]  # games of 2 and 3 moves; then 4, and 2 in the next episode
    assert infos["outcome"][0] == 0 and views["action_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


WRONG: list[tuple[Callable[[], object], str]] = [
    (game_factory("classic/no-such-game-v1"), "classic/no-such-game-v1"),
    (game_factory("classic/go-v5", size=5), "unexpected keyword argument 'size'"),
    (lambda: GameVectorEnv(TICTACTOE, 0), "num_envs >= 1"),
    (lambda: GameVectorEnv(TICTACTOE, 2).reset(seed=[1]), "1 seeds for 2 games"),
    (lambda: GameVectorEnv(TICTACTOE, 2).reset(options={"reset_mask": np.array([1, 0])}), "expected bool"),
    (lambda: GameVectorEnv(lambda: gymnasium.make("CartPole-v1"), 1), "leave env.self_play out"),
    (lambda: GameVectorEnv(lambda: SimpleNamespace(possible_agents=["a", "b"]), 1), "parallel_to_aec"),
    (lambda: GameVectorEnv(game_factory("classic/rps-v2"), 1), "observation (a Box) and action_mask"),
]


@pytest.mark.parametrize(("make", "named"), WRONG)
def test_bad_input_gets_one_line(make, named):
    with refused(named):
        make()


def test_go_planes_are_the_last_movers_stones_first():
    """Unlike PettingZoo's documentation: plane 0 is the opponent's stones, plane 1 one's own, plane 16 is 1 for white."""
    planes = one_game([24], go(0.5)).step(np.array([0]))[0]["observation"][0]
    assert planes.shape == (5, 5, 17)
    assert (planes[4, 4, 0], planes[0, 0, 1], planes[:, :, :2].sum(), planes[:, :, 16].sum()) == (1, 1, 2, 0)


FAKE_GO = """
import sys, time
REPLIES = {"genmove": "= c3", "final_score": "= W+2.5"}
for line in sys.stdin:
    word = line.split()[0]
    if word == "hang":
        time.sleep(60)
    if word in ("die", "quit"):
        sys.exit(3)
    reply = "? illegal move" if line.strip() == "play black A1" else REPLIES.get(word, "= " + line.strip())
    print(reply + "\\n", flush=True)
"""


@pytest.fixture
def fake_go(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "fake_go.py").write_text(FAKE_GO)
    return (sys.executable, str(tmp_path / "fake_go.py"))


def test_gtp(fake_go):
    with go_gtp.GTPPlayer(fake_go) as player:
        player.clear_board(5, 0.5)
        player.play("white", "pass")
        assert go_gtp.action_of(player.genmove("black"), 5) == 12
        assert player.final_score() == -2.5
        assert player.send("komi 6.5") == "komi 6.5"
        with refused("'play black A1': illegal move"):
            player.play("black", "A1")
    with refused("the program has ended"):
        player.genmove("black")
    player.close()
    with go_gtp.GTPPlayer(fake_go) as player, refused("'die'", "exit code 3"):
        player.send("die")
    with go_gtp.GTPPlayer(fake_go, timeout=0.1) as player, refused("'hang'", "0.1 s"):
        player.send("hang")
    with refused("'no-such-go'", "apt install gnugo"):
        go_gtp.GTPPlayer(("no-such-go",))


def test_vertices():
    assert [go_gtp.vertex_of(a, 5) for a in (0, 4, 20, 24, 25)] == ["A5", "E5", "A1", "E1", "pass"]
    assert (go_gtp.vertex_of(8, 9), go_gtp.vertex_of(360, 19)) == ("J9", "T1")  # no I
    for size in (5, 9, 19):
        assert [go_gtp.action_of(go_gtp.vertex_of(a, size), size) for a in range(size**2 + 1)] == list(range(size**2 + 1))
    for bad in ("I3", "A6", "A0", "F1", "resign", "", "3"):
        with refused(bad, "5"):
            go_gtp.action_of(bad, 5)
    with refused("action 26"):
        go_gtp.vertex_of(26, 5)


def test_gnu_go_and_pettingzoo_agree_on_every_board():
    try:
        player = go_gtp.GTPPlayer()
    except InputError as error:
        pytest.skip(str(error))
    game, rng, captured, colours = go(0.5)(), np.random.default_rng(0), 0, ("black", "white")
    game.reset()
    with player:
        player.clear_board(5, 0.5)
        for move in range(60):
            action = int(rng.choice(np.flatnonzero(game.observe(game.agent_selection)["action_mask"][:-1])))
            player.play(colours[move % 2], go_gtp.vertex_of(action, 5))
            game.step(action)
            planes = game.observe(game.agent_selection)["observation"]  # plane 0: of the player who has just moved
            for plane in (0, 1):
                vertices = player.send(f"list_stones {colours[(move + plane) % 2]}").split()
                stones = sorted(go_gtp.action_of(vertex, 5) for vertex in vertices)
                assert stones == np.flatnonzero(planes[:, :, plane]).tolist()
            captured = sum(int(player.send(f"captures {side}")) for side in colours)
    assert captured > 0


def test_oracle():
    """Known: 5,478 boards, a draw under perfect play. The values against random play were worked out by enumeration."""
    x, o = oracle.X, oracle.O
    assert len(oracle.reachable()) == 5478 and oracle.minimax(oracle.EMPTY, x) == 0
    assert oracle.random_play() == pytest.approx((0.58492, 0.28810, 0.12698), abs=5e-6)
    value = partial(oracle.best_response, oracle.EMPTY)
    assert [value(x), value(o)] == pytest.approx([191 / 192, 874 / 945])
    assert [value(x, True), value(o, True)] == pytest.approx([191 / 192, 866 / 945])
    for safe, worst in ((False, [0, -1]), (True, [0, 0])):  # as O, the best against random play can be beaten
        policy = oracle.best_policy(safe)
        assert [oracle.value_against_random(policy, p) for p in (x, o)] == pytest.approx([value(p, safe) for p in (x, o)])
        assert [oracle.worst_value(policy, p) for p in (x, o)] == worst


def test_oracle_board_and_planes():
    game = TICTACTOE()
    game.reset()
    for action in (4, 1, 6):
        game.step(action)
    board = (0, 2, 0, 0, 1, 0, 1, 0, 0)
    planes = game.observe(game.agent_selection)["observation"]
    assert oracle.board_of(planes) == board and planes.tolist() == oracle.planes_of(board)
    for board in oracle.reachable():
        assert oracle.board_of(oracle.planes_of(board)) == board

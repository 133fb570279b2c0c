"""How a run's policy fares against a random player and GNU Go at level 1, at each of its checkpoints:

    python recipes/go/play_gnugo.py runs/NAME [--games 100] [--random-games 400] [--greedy]

Half of the games with each color. The policy's moves are sampled, as in training, so that games differ;
`--greedy` takes the most probable instead. PettingZoo's rules decide: area scoring, every stone on the board
alive, no superko. A game of over 200 moves counts as not won. Intervals are Wilson's, at 95 %. Needs GNU Go:
apt install gnugo.
"""

from __future__ import annotations

import argparse
from math import sqrt
from typing import Any

import numpy as np
from gtp import GTPPlayer, action_of, vertex_of  # beside this file

from surefoot import PPO
from surefoot.build.control import build_vector
from surefoot.envs.games import game_factory
from surefoot.rollout.gym import run_episodes
from surefoot.storage.run_folder import RunFolder
from surefoot.train.checkpoint import load_checkpoint, restore_policy

MAX_MOVES = 200
COLORS = ("black", "white")


def against_gnugo(
    model: PPO, player: GTPPlayer, game: Any, *, seat: int, greedy: bool
) -> tuple[bool, tuple[int, ...]]:
    """Play one game, the policy in `seat` (0 is black); whether it won, and the moves."""
    size = int(game.observation_space("black_0")["observation"].shape[0])
    player.clear_board(size, model.config.env.kwargs["komi"])
    game.reset()
    moves: list[int] = []
    while len(moves) < MAX_MOVES and not any(game.terminations.values()):
        color = COLORS[len(moves) % 2]
        if len(moves) % 2 == seat:
            view = game.observe(game.agent_selection)
            views = {
                "observation": np.float32(view["observation"])[None],
                "action_mask": view["action_mask"][None],
            }
            move = int(model.predict(views, deterministic=greedy)[0][0])
            player.play(color, vertex_of(move, size))
        else:
            move = action_of(player.genmove(color), size)
        game.step(move)
        moves.append(move)
    return game.rewards[game.possible_agents[seat]] > 0, tuple(moves)


def against_random(model: PPO, games: int, *, greedy: bool) -> list[list[bool]]:
    """Whether the policy won each of `games` games, as black and as white."""
    env = build_vector(model.config, for_evaluation=True)
    played = run_episodes(model.policy, env, games, seed=None if greedy else 1)
    env.close()
    return [[one.info["outcome"] > 0 for one in played if one.info["seat"] == seat] for seat in (0, 1)]


def interval(wins: int, games: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share."""
    share = wins / games
    middle = (share + z * z / (2 * games)) / (1 + z * z / games)
    half = z / (1 + z * z / games) * sqrt(share * (1 - share) / games + z * z / (4 * games * games))
    return middle - half, middle + half


def row(name: str, opponent: str, won: list[list[bool]], note: str = "") -> None:
    """Print one line of the table."""
    wins, games = sum(map(sum, won)), sum(map(len, won))
    low, high = interval(wins, games)
    shares = " ".join(
        f"{color} {sum(part):3d}/{len(part):3d}" for color, part in zip(COLORS, won, strict=True)
    )
    print(
        f"{name:>8} {opponent:8} {shares}  won {wins / games:6.1%} [{low:.1%}, {high:.1%}]{note}", flush=True
    )


def main() -> None:
    """Play, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--random-games", type=int, default=400)
    parser.add_argument("--greedy", action="store_true")
    arguments = parser.parse_args()
    run = RunFolder.open(arguments.run)
    config = run.config()
    model = PPO(config.policy.model, config=config, verbose=0, run=run)
    kwargs = {name: value for name, value in config.env.kwargs.items() if name != "max_moves"}
    game = game_factory(config.env.id, **kwargs)()
    for path in [None, *sorted(path for path in run.checkpoints.glob("[0-9]*") if path.is_dir())]:
        name = "untrained" if path is None else path.name.lstrip("0")
        if path is not None:
            restore_policy(model.policy, load_checkpoint(path)[0]["policy"])
        row(name, "random", against_random(model, arguments.random_games, greedy=arguments.greedy))
        with GTPPlayer() as player:
            games = [
                against_gnugo(model, player, game, seat=i % 2, greedy=arguments.greedy)
                for i in range(arguments.games)
            ]
        different = f", {len({moves for _, moves in games})} different games"
        row(name, "gnugo 1", [[won for won, _ in games[seat::2]] for seat in (0, 1)], different)


if __name__ == "__main__":
    main()

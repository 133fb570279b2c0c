"""How good a trained tic-tac-toe policy is, exactly.

    python recipes/tictactoe/check.py runs/NAME [runs/NAME ...]

Every position that the policy can meet is enumerated by `oracle.py`, which knows the rules and nothing of
Surefoot. The policy takes its greedy move. Exits with 1 unless it always draws against perfect play and comes
within 0.01 of the largest values that any policy has against a random player.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))
import oracle
from surefoot import PPO

WITHIN = 0.01


def policy_of(model: PPO) -> oracle.Policy:
    """Board -> the cell that the network likes best."""

    @cache
    def policy(board: oracle.Board) -> int:
        mask = np.array([[cell == 0 for cell in board]], dtype=np.int8)
        views = {"observation": np.array([oracle.planes_of(board)], dtype=np.float32), "action_mask": mask}
        return int(model.predict(views, deterministic=True)[0][0])

    return policy


def check(folder: str) -> bool:
    """Print the four numbers of a run; whether all are reached."""
    policy = policy_of(PPO.open(folder))
    is_good = True
    for name, player in (("X", oracle.X), ("O", oracle.O)):
        best = oracle.best_response(oracle.EMPTY, player)
        worst, value = oracle.worst_value(policy, player), oracle.value_against_random(policy, player)
        is_good &= worst == 0 and value >= best - WITHIN
        outcome = "draws all" if worst == 0 else "can be beaten"
        print(
            f"{folder} as {name}: perfect play: {outcome}; random play: {value:.5f} (the best is {best:.5f})",
            flush=True,
        )
    return is_good


if __name__ == "__main__":
    reached = [check(folder) for folder in sys.argv[1:]]
    sys.exit(not all(reached))

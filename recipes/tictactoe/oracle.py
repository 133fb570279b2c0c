"""Tic-tac-toe solved by enumeration, from the rules alone; it shares no code with the library.

A board is a tuple of 9 cells, 0 empty, 1 X, 2 O, in PettingZoo's order of actions. X moves first. Values are
those of a named player: 1 for a win, 0 for a draw, -1 for a loss, expected where the other player is
uniformly random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

Board = tuple[int, ...]
Policy = Callable[[Board], int]

EMPTY: Board = (0,) * 9
X, O = 1, 2  # noqa: E741
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def to_move(board: Board) -> int:
    """Whose turn it is, by counting the marks."""
    return X if board.count(X) == board.count(O) else O


def legal_moves(board: Board) -> list[int]:
    return [cell for cell in range(9) if board[cell] == 0]


def after(board: Board, cell: int) -> Board:
    """The board once the player to move has taken this cell."""
    if board[cell]:
        raise ValueError(f"cell {cell} of {board} is taken")
    return (*board[:cell], to_move(board), *board[cell + 1 :])


@cache
def winner(board: Board) -> int | None:
    """X or O, 0 for a draw, None while the game is in progress."""
    for a, b, c in LINES:
        if board[a] and board[a] == board[b] == board[c]:
            return board[a]
    return None if 0 in board else 0


def value_at_end(board: Board, player: int) -> int:
    won_by = winner(board)
    return 0 if won_by == 0 else 1 if won_by == player else -1


@cache
def minimax(board: Board, player: int) -> int:
    """The player's value when both play perfectly."""
    if winner(board) is not None:
        return value_at_end(board, player)
    values = [minimax(after(board, cell), player) for cell in legal_moves(board)]
    return max(values) if to_move(board) == player else min(values)


def safe_moves(board: Board) -> list[int]:
    """The moves after which perfect play still draws; all legal ones where the game is already lost."""
    player = to_move(board)
    at_least = min(0, minimax(board, player))
    return [cell for cell in legal_moves(board) if minimax(after(board, cell), player) >= at_least]


@cache
def best_response(board: Board, player: int, safe: bool = False) -> float:
    """The highest value any policy (if `safe`, any that cannot be beaten) has against the random player."""
    return _against_random(
        board, player, lambda b, p: best_response(b, p, safe), safe_moves if safe else legal_moves
    )


def best_policy(safe: bool = False) -> Policy:
    """The deterministic policy with the value of `best_response`, in both seats; the first cell wins ties."""

    def policy(board: Board) -> int:
        player = to_move(board)
        moves = safe_moves(board) if safe else legal_moves(board)
        return max(moves, key=lambda cell: round(best_response(after(board, cell), player, safe), 9))

    return policy


def value_against_random(policy: Policy, player: int) -> float:
    """The value of a deterministic policy (board -> cell) against the random player."""

    @cache
    def value(board: Board, player: int) -> float:
        return _against_random(board, player, value, lambda b: [policy(b)])

    return value(EMPTY, player)


def worst_value(policy: Policy, player: int) -> int:
    """The value of a deterministic policy against the player that knows it; below 0 if it can be beaten."""

    @cache
    def value(board: Board) -> int:
        if winner(board) is not None:
            return value_at_end(board, player)
        if to_move(board) == player:
            return value(after(board, policy(board)))
        return min(value(after(board, cell)) for cell in legal_moves(board))

    return value(EMPTY)


def random_play() -> tuple[float, float, float]:
    """Chances that X wins, O wins, and of a draw, when both players are random."""

    @cache
    def chances(board: Board) -> tuple[float, ...]:
        if winner(board) is not None:
            return tuple(float(winner(board) == outcome) for outcome in (X, O, 0))
        moves = legal_moves(board)
        return tuple(
            sum(column) / len(moves)
            for column in zip(*(chances(after(board, m)) for m in moves), strict=True)
        )

    x, o, draw = chances(EMPTY)
    return x, o, draw


def board_of(planes: Any) -> Board:
    """The board behind a view [3, 3, 2] of `tictactoe_v3`, the player to move first, then the other.

    PettingZoo draws the cells by columns (0 3 6 / 1 4 7 / 2 5 8) but fills the planes in the order of the
    actions, so that action a is planes[a // 3, a % 3].
    """
    own, other = ([int(planes[a // 3][a % 3][plane]) for a in range(9)] for plane in (0, 1))
    me, them = (X, O) if sum(own) == sum(other) else (O, X)
    return tuple(me * mine + them * theirs for mine, theirs in zip(own, other, strict=True))


def planes_of(board: Board) -> list[list[list[int]]]:
    """The inverse of `board_of`: nested lists [3, 3, 2], as the player to move sees the board."""
    me = to_move(board)
    return [[[int(board[3 * i + j] == p) for p in (me, 3 - me)] for j in range(3)] for i in range(3)]


def reachable(board: Board = EMPTY) -> set[Board]:
    """All boards that play can come to, the finished ones too."""
    seen, frontier = {board}, [board]
    while frontier:
        current = frontier.pop()
        if winner(current) is None:
            new = {after(current, cell) for cell in legal_moves(current)} - seen
            seen |= new
            frontier += new
    return seen


def _against_random(
    board: Board, player: int, value: Callable[[Board, int], float], choices: Callable[[Board], Sequence[int]]
) -> float:
    if winner(board) is not None:
        return value_at_end(board, player)
    if to_move(board) == player:
        return max(value(after(board, cell), player) for cell in choices(board))
    moves = legal_moves(board)
    return sum(value(after(board, cell), player) for cell in moves) / len(moves)

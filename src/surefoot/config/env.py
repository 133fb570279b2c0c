"""The section `env`: a Gymnasium environment in place of a text task, and opponents for two-player games."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from surefoot.config.fields import Fraction, FunctionName, Positive, Section, setting


class SelfPlayConfig(Section):
    """Opponents of a two-player game: the latest snapshot, a pool of earlier ones, a random player."""

    pool_size: Positive = setting(10, "Snapshots in the opponent pool.")
    snapshot_every: Positive = setting(10, "Updates between two snapshots.")
    latest: Fraction = setting(0.5, "Share of games against the latest snapshot.")
    random: Fraction = setting(0.1, "Share of games against a random player; the rest are against the pool.")
    random_move_prob: Fraction = setting(
        0.0,
        "Probability of a random move of a snapshot: games reach positions that good play avoids.",
    )

    @model_validator(mode="after")
    def _shares(self) -> SelfPlayConfig:
        if self.latest + self.random > 1:
            raise ValueError(
                f"latest ({self.latest}) and random ({self.random}) are shares of all games; "
                "they add up to over 1"
            )
        return self


class EnvConfig(Section):
    """The Gymnasium environment, in place of a text task."""

    id: FunctionName | None = setting(
        None,
        "Gymnasium id, `file.py:function` or `package.module:function` that returns an environment, or a "
        "game of PettingZoo such as `classic/tictactoe-v3`; `null`: one made in Python.",
    )
    total_timesteps: Positive = setting(
        100_000, "Steps in the whole run, all sub-environments; rounded up to whole updates."
    )
    n_steps: Positive = setting(2048, "Steps of each sub-environment in one update.")
    n_envs: Positive = setting(1, "Number of sub-environments.")
    vectorization: Literal["sync", "async", "native"] = setting(
        "sync",
        "One process (`sync`), one worker process per sub-environment (`async`), or the environment's own "
        "vectorized form (`native`: Atari, CartPole).",
    )
    kwargs: dict[str, Any] = setting(
        {},
        "Keyword arguments of the environment; of games also `max_moves`, for truncation.",
    )
    eval_kwargs: dict[str, Any] = setting({}, "Changes to `kwargs` for evaluation.")
    normalize_observations: bool = setting(
        False,
        "Normalize Box observations by their running mean and std, clipped to ±10; saved with the policy.",
    )
    normalize_rewards: bool = setting(
        False, "Divide rewards by the running std of the discounted return, clipped to ±10."
    )
    self_play: SelfPlayConfig | None = setting(
        None, "Opponents of a two-player game; `null`: for PettingZoo's games these defaults."
    )

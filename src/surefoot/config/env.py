"""The section `env`: a Gymnasium environment in place of a text task, and opponents for two-player games."""

from typing import Any, Literal

from pydantic import model_validator

from surefoot.config.fields import Fraction, FunctionName, Positive, Section, setting


class SelfPlayConfig(Section):
    """Opponents of a two-player game: the latest snapshot, a pool of earlier ones, a random player."""

    pool_size: Positive = setting(10, "Snapshots in the opponent pool.")
    snapshot_every: Positive = setting(10, "Updates between two snapshots.")
    latest: Fraction = setting(0.5, "Share of games against the latest snapshot.")
    random: Fraction = setting(0.1, "Share of games against a random player; the rest are against the pool.")
    random_move_prob: Fraction = setting(0.0, "Probability that a snapshot moves at random.")

    @model_validator(mode="after")
    def _shares(self) -> "SelfPlayConfig":
        if self.latest + self.random > 1:
            raise ValueError(f"latest ({self.latest}) and random ({self.random}) add up to more than 1")
        return self


class EnvConfig(Section):
    """The Gymnasium environment, in place of a text task."""

    id: FunctionName | None = setting(
        None, "Gymnasium id, `file.py:function`, PettingZoo's `classic/tictactoe-v3`; `null`: from Python."
    )
    total_timesteps: Positive = setting(100_000, "Steps in the run, of all sub-environments; rounded up.")
    n_steps: Positive = setting(2048, "Steps of each sub-environment in one update.")
    n_envs: Positive = setting(1, "Number of sub-environments.")
    vectorization: Literal["sync", "async", "native"] = setting(
        "sync", "`sync`: one process; `async`: a worker process each; `native`: its own (Atari, CartPole)."
    )
    reseed: bool = setting(
        True, "Seed each episode: a resume repeats it; `false`: the first, as in Gymnasium."
    )
    kwargs: dict[str, Any] = setting({}, "Keyword arguments; of games also `max_moves`, for truncation.")
    eval_kwargs: dict[str, Any] = setting({}, "Changes to `kwargs` for evaluation.")
    normalize_observations: bool = setting(False, "Box spaces, by running mean and std; clipped to ±10.")
    normalize_rewards: bool = setting(False, "By the running std of discounted returns, clipped to ±10.")
    self_play: SelfPlayConfig | None = setting(None, "Opponents; `null`: of PettingZoo's games the defaults.")

"""Completions of several words: the whole program learns two small tasks within seconds, each on three seeds."""

from pathlib import Path
from typing import Any

import pytest

from tests.learn.words import PLACES, repeat, word_run


def brevity(prompts: list[str], completions: list[str]) -> list[float]:
    """Best is to say nothing. The end token must be a trained action, or nobody learns to stop."""
    return [-len(text.split()) / PLACES for text in completions]


# Reward, settings, and the least that every seed must gain on the untrained policy. Over seeds 0 to 5 the gains were at
# least 0.71 for repeating and 0.50 for brevity, of 1 that can be gained.
TASKS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "repeat": (repeat, {"total_episodes": 3_200, "kl": {"coef": 0.01}}, 0.6),
    "brevity": (brevity, {"total_episodes": 640, "kl": {"coef": 0.05}}, 0.4),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("task", TASKS)
def test_every_seed_learns(task: str, adapter: bool, tmp_path: Path) -> None:
    reward, settings, least_gain = TASKS[task]
    for seed in (0, 1, 2):
        model = word_run(reward, tmp_path, seed=seed, adapter=adapter, lr_schedule="linear", **settings)
        untrained = model.evaluate()
        trained = model.learn().evaluate()
        assert trained["eval/reward"] > untrained["eval/reward"] + least_gain, f"seed {seed}"
        assert trained["eval/kl"] > 0.5 > abs(untrained["eval/kl"]), f"seed {seed}"

"""Answers of several words: the whole program learns two small tasks within seconds, each on three seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surefoot import PPO, TextTask
from tests.learn.words import word_policy

WORDS_PER_ANSWER = 5
PROMPTS = ["a", "b", "c", "d"]


def repeat(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the answer's places with the prompt's own word: the policy has to look at the prompt all the way."""
    return [text.split().count(prompt) / WORDS_PER_ANSWER for prompt, text in zip(prompts, completions, strict=True)]


def brevity(prompts: list[str], completions: list[str]) -> list[float]:
    """Best is to say nothing. The end token must be a trained action, or nobody learns to stop."""
    return [-len(text.split()) / WORDS_PER_ANSWER for text in completions]


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
        model = PPO(
            word_policy(seed=seed, width=32, adapter=adapter),
            TextTask(PROMPTS, reward, held_out=PROMPTS * 16),
            verbose=0,
            run_folder=str(tmp_path),
            run_checkpoint_every=1_000,
            evaluate_every=None,
            seed=seed,
            device="cpu",
            max_new_tokens=WORDS_PER_ANSWER,
            episodes_per_update=64,
            batch_size=32,
            n_epochs=2,
            learning_rate=5e-3,
            lr_schedule="linear",
            **settings,
        )
        untrained = model.evaluate()
        trained = model.learn().evaluate()
        assert trained["eval/reward"] > untrained["eval/reward"] + least_gain, f"seed {seed}"
        assert trained["eval/kl"] > 0.5 > abs(untrained["eval/kl"]), f"seed {seed}"

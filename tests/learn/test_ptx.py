"""A reward that pulls away from the demonstrations: the mixed run keeps them likely, and still learns what is rewarded."""

from pathlib import Path
from typing import Any

import pytest

from surefoot import PPO, SFT, TextTask
from tests.learn.words import PLACES, PROMPTS, word_policy

# Each prompt's own word, three times: what is demonstrated, and what no completion is rewarded for.
EXAMPLES = [{"prompt": prompt, "completion": f"{prompt} {prompt} {prompt}"} for prompt in PROMPTS]


def other_word(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the completion's places with a word that is in none of the demonstrations."""
    return [text.split().count("g") / PLACES for text in completions]


def ended(tmp_path: Path, seed: int, coef: float) -> tuple[dict[str, float], dict[str, float]]:
    """The evaluations before and after a run that begins from the demonstrations."""
    policy = word_policy(seed=seed, width=32)
    common: dict[str, Any] = {"verbose": 0, "run_folder": str(tmp_path), "evaluate_every": None, "seed": seed, "device": "cpu"}
    SFT(policy, EXAMPLES * 8, held_out=0.0, epochs=6, learning_rate=5e-3, **common).learn()
    # Twice and three times, so that some can be held out.
    data = [*EXAMPLES, *({"prompt": p, "completion": f"{p} {p}"} for p in PROMPTS)]
    sizes = {"total_episodes": 960, "episodes_per_update": 64, "batch_size": 32, "max_new_tokens": PLACES}
    ptx, task = {"coef": coef, "batch_size": 4, "held_out": 0.5}, TextTask(PROMPTS, other_word, held_out=PROMPTS * 16)
    rest = {"kl": {"coef": 0.0}, "ent_coef": 0.01, "learning_rate": 5e-3}
    model = PPO(policy, task, ptx_data=data, ptx=ptx, **sizes, **rest, **common)
    before = model.evaluate()
    return before, model.learn().evaluate()


# Over seeds 0 to 2 the perplexity went from 2.1 to between 298 and 6,566 without demonstrations, to between 11 and 15 with
# them; the reward came to at least 0.85 and 0.59, of 1.
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demonstrations_that_are_mixed_in_stay_likely(seed: int, tmp_path: Path) -> None:
    before, plain = ended(tmp_path, seed, 0.0)
    _, mixed = ended(tmp_path, seed, 0.1)
    assert before["eval/ptx_perplexity"] < 3 and before["eval/reward"] < 0.1
    assert plain["eval/reward"] > 0.7 and mixed["eval/reward"] > 0.4
    assert 4 * mixed["eval/ptx_perplexity"] < plain["eval/ptx_perplexity"]

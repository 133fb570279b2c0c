"""Several completions of one prompt: which belong together, and the greedy one they may be compared with."""

from typing import Any

import pytest
import torch

from surefoot import collect
from surefoot.config import GenerationConfig
from surefoot.envs.text import TextTask
from surefoot.generation.engine import TokenEngine, generate
from surefoot.types import Batch, Request, SamplingParams
from tests.fakes import config_of
from tests.golden import refused
from tests.tiny import tiny_policy

PROMPTS = ["the", "a band", "1, 2", "who?", "thin ice"]
GENERATION = GenerationConfig(max_new_tokens=6, slots=5)


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [len(prompt) + 10.0 * len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


def played(*, episodes: int = 12, first_episode: int = 0, **settings: Any) -> Batch:
    config = config_of(**settings).model_copy(update={"generation": GENERATION})
    task = TextTask(PROMPTS, letters, held_out=0.0)
    return collect(tiny_policy(moved=True), task, episodes=episodes, first_episode=first_episode, config=config)


def test_the_completions_of_a_prompt_stand_in_a_row_and_differ() -> None:
    batch = played(group={"size": 4})
    prompts = [t.prompt for t in batch.trajectories]
    assert prompts == [prompt for prompt in dict.fromkeys(prompts) for _ in range(4)]
    assert batch.groups_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(t.completion_tokens) for t in batch.trajectories}) > 6


def test_the_next_update_goes_on_with_the_next_prompts() -> None:
    whole, later = played(group={"size": 2}), played(episodes=4, first_episode=8, group={"size": 2})
    texts, late = ([(t.prompt, t.completion_tokens) for t in batch.trajectories] for batch in (whole, later))
    assert late == texts[8:] and later.groups_B.tolist() == whole.groups_B.tolist()[8:] == [4, 4, 5, 5]
    assert played(episodes=7).groups_B.tolist() == list(range(7))  # alone each completion is a group
    for episodes, first in ((10, 0), (12, 6)):
        with refused("no whole groups of group.size"):
            played(episodes=episodes, first_episode=first, group={"size": 4})


@pytest.mark.parametrize("clip", [None, 30.0])
def test_the_greedy_completions_reward_stands_beside_its_group_and_its_tokens_do_not(clip: float | None) -> None:
    batch = played(group={"size": 4}, advantage="remax", shaping={"clip": clip})
    plain = played(group={"size": 4}, shaping={"clip": clip})
    assert [t.completion_tokens for t in batch.trajectories] == [t.completion_tokens for t in plain.trajectories]
    assert torch.equal(batch.rewards_BT, plain.rewards_BT) and plain.baselines_B is None
    policy = tiny_policy(moved=True)
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    requests = [Request(t.prompt_tokens, seed=0, params=params) for t in batch.trajectories[::4]]
    texts = [policy.decode(completion.tokens) for completion in generate(TokenEngine(policy), requests)]
    expected = letters([t.prompt for t in batch.trajectories[::4]], texts)
    assert batch.baselines_B.tolist() == [min(score, clip or score) for score in expected for _ in range(4)]

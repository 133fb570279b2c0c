"""Every kind of critic learns what it is asked, while the policy stands still and so the values have a right answer."""

from __future__ import annotations

import pytest
import torch

from surefoot import TextTask, advantages, collect, update
from surefoot.config import CriticConfig, GenerationConfig, PPOConfig
from surefoot.core.masked import explained_variance
from surefoot.train.update import make_optimizer
from tests.learn.words import word_policy

CONTEXTS = ["P", "Q", "R"]


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    return [
        float(text.count(prompt.replace("P", "a").replace("Q", "b").replace("R", "c")))
        for prompt, text in zip(prompts, completions, strict=True)
    ]


@pytest.mark.parametrize("kind", ["shared", "adapter", "separate"])
def test_explained_variance_rises(kind):
    critic = CriticConfig(kind=kind, stop_gradient=kind == "shared")
    policy = word_policy(adapter=True, critic=critic)
    ppo = PPOConfig(critic_warmup_updates=100, learning_rate=0.01, batch_size=60, n_epochs=2, gae_lambda=1.0, kl_coef=0.0)
    optimizer, task = make_optimizer(policy, ppo), TextTask(CONTEXTS, reward, held_out=[])
    generation = GenerationConfig(max_new_tokens=4, slots=240)
    explained = []
    for number in range(12):
        batch = collect(policy, task, episodes=240, first_episode=240 * number, generation=generation, ppo=ppo)
        advantages(batch, ppo)
        explained.append(float(explained_variance(batch.values_BT, batch.returns_BT, batch.mask_BT)))
        update(policy, batch, optimizer=optimizer, config=ppo)
    assert explained[0] == pytest.approx(0, abs=1e-6)
    print(kind, [round(e, 2) for e in explained])
    assert sum(explained[-3:]) / 3 > 0.3

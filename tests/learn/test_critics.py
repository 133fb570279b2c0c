"""Every kind of critic learns what it is asked, while the policy stands still and so the values have a right answer."""

import functools

import pytest

from surefoot import TextTask, advantages, collect, update
from surefoot.config import CriticConfig
from surefoot.core.masked import explained_variance
from surefoot.train.ppo_objective import PPOObjective
from surefoot.train.update import make_optimizer
from tests.fakes import config_of
from tests.learn.words import word_policy

COUNTED = {"P": "a", "Q": "b", "R": "c"}


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """How often each completion has the word that its prompt asks for."""
    return [float(text.count(COUNTED[prompt])) for prompt, text in zip(prompts, completions, strict=True)]


@functools.cache
def explained(kind: str) -> list[float]:
    """Explained variance before each of 14 updates in which the critic alone learns."""
    critic = CriticConfig.model_validate({"kind": kind, "stop_gradient": kind == "shared"})
    policy = word_policy(adapter=True, critic=critic)
    rest = {"batch_size": 60, "gae_lambda": 1.0, "kl": {"coef": 0.0}, "max_new_tokens": 4, "slots": 240}
    ppo = config_of(critic={"warmup_updates": 100}, learning_rate=0.01, **rest)
    optimizer, task = make_optimizer(policy), TextTask(list(COUNTED), reward, held_out=[])
    found = []
    for number in range(14):
        batch = collect(policy, task, episodes=240, first_episode=240 * number, config=ppo)
        advantages(batch, ppo)
        found.append(float(explained_variance(batch.values_BT, batch.returns_BT, batch.mask_BT)))
        update(policy, batch, PPOObjective(ppo), optimizer=optimizer)
    return found


@pytest.mark.parametrize("kind", ["adapter", "separate"])
def test_a_separate_critic_explains_what_a_head_on_a_trunk_that_stands_still_cannot(kind):
    own, head = explained(kind), explained("shared")
    assert own[0] == pytest.approx(0, abs=1e-6) == head[0]
    assert sum(own[-4:]) / 4 > 0.2
    assert 0 < sum(head[-4:]) / 4 < 0.1

"""Environments whose best return is known, learned in seconds; one of them only with a recurrent state."""

from typing import Any

import gymnasium
import numpy
import pytest
import torch
from gymnasium import spaces

from surefoot import PPO, evaluate_policy

# Chance of a payment of 1 by context and arm: the best are 0.8 and 0.9, so the best mean is 0.85.
CHANCES = ((0.2, 0.8), (0.9, 0.1))
pytestmark = pytest.mark.usefixtures("in_own_folder")


class Bandit(gymnasium.Env):
    """One step: a context is seen, an arm is pulled."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.context = int(self.np_random.integers(2))
        return self.context, {}

    def step(self, action: Any) -> Any:
        return self.context, float(self.np_random.random() < CHANCES[self.context][action]), True, False, {}


class Corridor(gymnasium.Env):
    """A T-maze: which way to turn at the end is shown at the first step and never again. 1 for the right turn, -1 else."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)
    LENGTH = 4

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.at = int(self.np_random.integers(2)), 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.at += 1
        over = self.at == self.LENGTH
        return self._observation(), (1.0 if action == self.cue else -1.0) if over else 0.0, over, False, {}

    def _observation(self) -> Any:
        cue = (2 * self.cue - 1) if self.at == 0 else 0
        return numpy.array([cue, self.at == self.LENGTH - 1], dtype=numpy.float32)


def train(policy: str, env: str, timesteps: int, **settings: Any) -> PPO:
    model = PPO(policy, f"{__file__}:{env}", n_envs=16, seed=1, device="cpu", verbose=0, evaluate_episodes=0, **settings)
    return model.learn(timesteps)


def test_a_contextual_bandit_is_solved_and_valued() -> None:
    model = train("MlpPolicy", "Bandit", 16 * 32 * 20, n_steps=32, batch_size=128, n_epochs=4, learning_rate=5e-3)
    observations = model.policy.prepare({"obs": numpy.arange(2)})
    with torch.no_grad():
        latent = model.policy.layers.policy(model.policy.extractor(observations))
        chances = torch.softmax(model.policy.head.linear(latent), -1)
    values = model.policy.values(observations, {}, episode_starts=torch.ones(2, dtype=torch.bool))
    assert chances[0, 1] > 0.97 and chances[1, 0] > 0.97
    assert values.tolist() == pytest.approx([0.8, 0.9], abs=0.06)
    assert model.predict(0, deterministic=True)[0] == 1 and model.predict(1, deterministic=True)[0] == 0


@pytest.mark.parametrize(("policy", "solves"), [("MlpLstmPolicy", True), ("MlpPolicy", False)])
def test_what_was_seen_at_the_start_only_an_lstm_remembers(policy: str, solves: bool) -> None:
    settings = {"policy_kwargs": {"lstm_hidden_size": 16, "net_arch": [16]}} if solves else {}
    model = train(policy, "Corridor", 16 * 16 * 40, n_steps=16, batch_size=64, n_epochs=4, learning_rate=1e-2, **settings)
    mean, _ = evaluate_policy(model, Corridor(), n_eval_episodes=100)
    assert mean == 1.0 if solves else abs(mean) < 0.35

"""The loop's parts in a user's hands, for text and for Gymnasium, and the program that shows them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

from surefoot import PPO, PPOObjective, advantages, collect, make_env, make_optimizer, make_policy, update
from surefoot.config import Config
from surefoot.core.seeds import derived_seed
from tests.inputs import refusal
from tests.tiny import tiny_lm, tiny_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_the_loop.py"
PPO_SETTINGS: dict[str, Any] = {"batch_size": 16, "n_epochs": 2, "learning_rate": 1e-3}


def config_of(n_steps: int = 16) -> Config:
    return Config(policy={"model": "MlpPolicy"}, env={"n_steps": n_steps}, ppo=PPO_SETTINGS)


def run_example(*arguments: str) -> list[list[float]]:
    """The numbers of each update's line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("update ")]
    return [[float(number) for number in re.findall(r"-?\d+\.?\d*", line)] for line in lines]


def test_two_updates_on_a_model_folder(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        tiny_lm("llama").save_pretrained(tmp_path)
    # It knows no capital letters and drops those of the example's prompts.
    tiny_tokenizer().save_pretrained(tmp_path)
    first, second = run_example("--model", str(tmp_path), "--updates", "2", "--episodes", "16")
    assert all(-24 <= reward <= -1 and norm > 0 for _, reward, _, norm in (first, second))
    # Policy and reference are one before the first step (to bfloat16, where that is the arithmetic), not after it.
    assert abs(first[2]) < 0.05 < abs(second[2])


def test_a_pole_is_kept_up_for_longer() -> None:
    returns = [line[1] for line in run_example("--env", "CartPole-v1", "--updates", "6")]
    assert len(returns) == 6 and returns[0] < 30 and returns[-1] > 35


def test_ones_own_loop_is_the_loop(tmp_path: Path) -> None:
    """The same seeds, the same numbers as `PPO.learn`."""
    settings: dict[str, Any] = {"seed": 3, "n_envs": 2, "n_steps": 16, "evaluate_episodes": 0, **PPO_SETTINGS}
    model = PPO("MlpPolicy", "CartPole-v1", verbose=0, device="cpu", run_folder=str(tmp_path), **settings).learn(96)
    config, env = config_of(), make_env("CartPole-v1", n_envs=2, seed=3)
    policy = make_policy(env, seed=3)
    objective = PPOObjective(config)
    optimizer = make_optimizer(policy, objective)
    for number in range(3):
        batch = advantages(collect(policy, env, seed=3, version=number, config=config), config)
        shuffle = torch.Generator().manual_seed(derived_seed(3, "minibatches", number))
        update(policy, batch, objective, optimizer=optimizer, generator=shuffle)
    theirs = dict(model.policy.named_parameters())
    assert all(torch.allclose(parameter, theirs[name], atol=1e-6) for name, parameter in policy.named_parameters())


@pytest.mark.parametrize("kind", ["MlpPolicy", "MlpLstmPolicy"])
def test_each_call_goes_on_where_the_last_one_stopped(kind: str) -> None:
    env = make_env("CartPole-v1", n_envs=2, max_episode_steps=11)
    policy = make_policy(env, kind, net_arch=[8])
    episodes = []
    for number in range(4):
        seen = None if env.position is None else torch.from_numpy(env.position.observations["obs"])
        batch = collect(policy, env, version=number, config=config_of(8))
        assert batch.mask_BT.shape == (2, 8)
        assert seen is None or torch.equal(batch.observations["obs"][:, 0], seen)
        episodes += batch.trajectories
    # Of 32 steps in each sub-environment, those of the episodes that ended are all counted.
    assert sum(episode.steps for episode in episodes) + int(env.position.lengths.sum()) == 64
    assert all(0 < episode.steps <= 11 for episode in episodes) and any(episode.steps > 8 for episode in episodes)


def test_an_id_or_a_bare_environment_begins_new_episodes_in_each_call() -> None:
    policy = make_policy(make_env("CartPole-v1"))
    for env in ("CartPole-v1", gymnasium.make("CartPole-v1")):
        first, again, other = (collect(policy, env, version=v, config=config_of(8)).observations["obs"] for v in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first[:, 0], other[:, 0])


def test_what_is_no_environment_is_refused() -> None:
    assert "CartPole-v1" in refusal(lambda: make_env("CartPol-v1"))
    refusal(lambda: collect(make_policy(make_env("CartPole-v1")), 5), "env: expected a Gymnasium id")


def test_an_environment_that_two_models_use_one_after_the_other_is_each_ones_own(in_own_folder: None) -> None:
    env = make_env("CartPole-v1", n_envs=2)
    small = {"normalize_rewards": True, "n_steps": 16, "batch_size": 16, "verbose": 0, "evaluate_episodes": 0}
    for kind in ("MlpPolicy", "MlpLstmPolicy"):
        PPO(kind, env, **small).learn(32)
        assert env.reward_stats.count == 32  # not those of the model before


def test_an_id_is_made_as_the_configuration_says() -> None:
    config = Config(policy={"model": "MlpPolicy"}, env={"n_steps": 8, "n_envs": 4, "kwargs": {"max_episode_steps": 3}})
    batch = collect(make_policy(make_env("CartPole-v1")), "CartPole-v1", config=config)
    assert batch.mask_BT.shape == (4, 8) and all(episode.steps <= 3 for episode in batch.trajectories)

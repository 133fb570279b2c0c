"""Rewards that are added up: the sum by hand, every part in the logs, and what is refused before a model is loaded."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import yaml

from surefoot import PPOObjective, RewardModel, TextTask, advantages, update
from surefoot.config import ShapingConfig, absolute_paths, load_config
from surefoot.core.running import RunningStats
from surefoot.rewards.mixed import MixedReward, assign_rewards
from surefoot.rewards.shaping import shape_rewards
from surefoot.types import StopReason
from tests.fakes import assert_close, config_of, trajectory
from tests.golden import refused
from tests.inputs import model_folder, run_cli, write_project
from tests.rollout.test_text import played, task, text_rollout
from tests.test_reward_model import FAST, PAIRS
from tests.tiny import tiny_policy
from tests.train.small_run import rows

TWO = """
def long(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) for text in completions]
"""
PARTS = [{"name": "reward.py:long", "weight": -0.5}, {"name": "reward.py:vowels", "weight": 2, "label": "aeiou"}]
functions: dict[str, Any] = {}
exec(TWO, functions)
long, vowels = functions["long"], functions["vowels"]


def test_the_sum_by_hand_and_what_shaping_adds():
    answers = [trajectory(text, stop_reason=StopReason.LENGTH) for text in ("fine", "you and me")]
    mixed = MixedReward({"long": (long, -0.5), "vowels": (vowels, 2), "unused": (long, 0)})
    assign_rewards(mixed, answers)
    assert [t.reward for t in answers] == [-0.5 * 4 + 2 * 2, -0.5 * 10 + 2 * 4]
    assert answers[1].reward_parts == {"reward": 3.0, "part/long": 10.0, "part/vowels": 4.0, "part/unused": 10.0}
    shape_rewards(answers, ShapingConfig(missing_eos_penalty=1.0, clip=1.5), RunningStats())
    shaped = {"shaped": 1.5, "missing_eos_penalty": -1.0}
    assert answers[1].record()["reward"] == answers[1].reward_parts and answers[1].reward_parts.items() >= shaped.items()
    assign_rewards(long, answers)
    assert [t.reward_parts for t in answers] == [{"reward": 4.0}, {"reward": 10.0}]


def test_each_part_gets_what_a_function_gets_and_is_checked_as_one():
    recording = Mock(return_value=[1.0])
    assign_rewards(MixedReward({"a": (recording, 1), "b": (recording, 1)}), [trajectory("x", columns={"answer": 4})])
    assert recording.mock_calls == [call(prompts=["How are you?"], completions=["x"], answer=[4])] * 2
    for bad in (lambda **given: [math.nan], lambda **given: [1.0, 2.0], lambda **given: 1 / 0):
        with refused("the reward b function"):
            assign_rewards(MixedReward({"a": (long, 1), "b": (bad, 1)}), [trajectory("x")])
    with refused("add up to inf for sample 0"):
        assign_rewards(MixedReward({"a": (lambda **given: [1e10], 1e300)}), [trajectory("x")])


def test_a_part_that_is_none_is_left_out_of_the_sum_and_a_sample_without_any_of_everything():
    answers = [trajectory(text) for text in ("you", "and", "me")]
    some = {"a": (lambda **_: [1.0, None, None], 2.0), "b": (lambda **_: [0.5, 3.0, None], -1.0)}
    assign_rewards(MixedReward(some), answers)
    assert [t.reward for t in answers[:2]] == [1.5, -3.0] and not answers[2].is_rewarded
    assert [t.reward_parts for t in answers[:2]] == [
        {"reward": 1.5, "part/a": 1.0, "part/b": 0.5},
        {"reward": -3.0, "part/b": 3.0},
    ]
    stats = shape_rewards(answers, ShapingConfig(scale="running_std"), RunningStats())
    assert stats == RunningStats().updated([1.5, -3.0]) and "shaped" not in answers[2].reward_parts


@pytest.mark.parametrize("settings", [{}, *({"group": {"size": 4}, "advantage": name} for name in ("grpo", "rloo", "remax"))])
def test_a_sample_without_a_reward_teaches_nothing(settings):
    """The weights after an update are those of a batch that never had the sample."""
    config = config_of(micro_batch_tokens=60, batch_size=16, n_epochs=1, **settings)

    def some(completions, **columns):  # not to the first group, one of the second, and of remax the fourth's greedy answer
        return [None if i in (0, 1, 2, 3, 5, 19) else float(len(text)) for i, text in enumerate(completions)]

    policies = [tiny_policy(moved=True) for _ in range(2)]
    batches = [played(policy, task(reward=some), ppo=config) for policy in policies]
    rewards = torch.tensor([t.reward for t in batches[0].trajectories])
    assert int(rewards.isnan().sum()) == 5 and batches[0].metrics["reward/left_out"] == 5 / 16
    assert batches[0].metrics["reward/mean"] == float(rewards[~rewards.isnan()].mean())
    kept = [i for i in range(12 if config.ppo.advantage == "remax" else 16) if i not in (0, 1, 2, 3, 5)]
    batches[1] = batches[1].rows(torch.tensor(kept))
    for policy, batch in zip(policies, batches, strict=True):
        update(policy, advantages(batch, config), PPOObjective(config), check_first=True)
    with_them, without = ({name: p.detach() for name, p in policy.named_parameters_to_train()} for policy in policies)
    assert_close(with_them, without, 1e-6)
    before = dict(tiny_policy(moved=True).named_parameters_to_train())
    assert any(not torch.equal(value, before[name]) for name, value in without.items())


def test_a_batch_without_any_reward_is_no_update_and_an_evaluation_without_any_is_one_line():
    policy, config = tiny_policy(moved=True), config_of(micro_batch_tokens=60)
    batch = played(policy, task(reward=lambda prompts, **_: [None] * len(prompts)), ppo=config)
    assert "reward/mean" not in batch.metrics and batch.metrics["reward/left_out"] == 1.0
    objective = PPOObjective(config_of(config, kl={"target": 0.01, "coef": 0.1}))
    assert update(policy, advantages(batch, config), objective).steps == 0
    objective.finish(batch)
    assert objective.kl_coef == 0.1  # no completion, no KL to go by
    nothing = task(reward=lambda prompts, **_: [None] * len(prompts), held_out=0.5)
    with refused("returned None for all"):
        text_rollout(policy, nothing).evaluate(4)


def test_a_list_of_functions_is_their_sum():
    assert MixedReward([long, vowels]).parts == {"long": (long, 1.0), "vowels": (vowels, 1.0)}
    with refused("two functions of one name"):
        task(reward=[long, long])


UNFIT: list[Any] = [({}, "weight"), ({"a": (long, 0.0)}, "weight"), ({"a/b": (long, 1.0)}, "'a/b'"), ([5], "function")]
UNFIT += [({"a": (long, math.nan)}, "weight of a is nan"), *(({"a": bad}, "got 'a'") for bad in ((len, True), len, (1.0, len)))]


@pytest.mark.parametrize(("parts", "named"), UNFIT)
def test_what_is_not_a_reward_in_python_is_one_line(parts, named):
    with refused("reward: ", named):
        TextTask(["a"], parts)


@pytest.mark.parametrize("settings", [{}, {"group": {"size": 4}, "advantage": "remax"}])
def test_a_batch_is_that_of_the_one_function_that_is_the_sum(settings):
    def both(prompts, completions, **columns):
        return [-0.5 * a + 2 * b for a, b in zip(long(prompts, completions), vowels(prompts, completions), strict=True)]

    ppo = config_of(micro_batch_tokens=60, **settings)
    mixed = played(env=task(reward={"long": (long, -0.5), "vowels": (vowels, 2)}), ppo=ppo)
    whole = played(env=task(reward=both), ppo=ppo)
    assert torch.equal(mixed.rewards_BT, whole.rewards_BT) and (mixed.baselines_B is None) == (not settings)
    assert mixed.baselines_B is None or torch.equal(mixed.baselines_B, whole.baselines_B)
    assert mixed.metrics.keys() - whole.metrics.keys() == {"reward/part/long", "reward/part/vowels"}
    parts = -0.5 * mixed.metrics["reward/part/long"] + 2 * mixed.metrics["reward/part/vowels"]
    assert mixed.metrics["reward/mean"] == pytest.approx(parts)


def test_a_file_names_parts_which_are_logged_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = {"rollout": {"total_episodes": 16}, "shaping": {"scale": "running_std"}}
    project = write_project(tmp_path / "project", reward=TWO, task={"reward": PARTS}, **sections)
    flags = ("--run.folder", "runs", "--device", "cpu")
    assert (done := run_cli("ppo", project, *flags, "--run.name", "whole")).code == 0, done.err
    logged = rows(Path("runs/whole"))
    last = [row for row in logged if "eval/reward" in row][-1]
    updates = [row for row in logged if "reward/mean" in row]
    assert len(updates) == 4
    for row, total, part in [(last, "eval/reward", "eval/part/"), *((row, "reward/mean", "reward/part/") for row in updates)]:
        assert row[total] == pytest.approx(-0.5 * row[f"{part}long"] + 2 * row[f"{part}aeiou"], abs=1e-5)
    for sample in rows(Path("runs/whole"), "samples.jsonl"):
        assert sample["reward"]["part/long"] == len(sample["completion"])
    kept = yaml.safe_load(Path("runs/whole/config.yaml").read_text())["task"]["reward"]
    assert [part["name"] for part in kept] == [f"{tmp_path / 'project' / 'reward.py'}:{name}" for name in ("long", "vowels")]


def test_paths_of_parts_are_the_files_and_survive_a_round_trip(tmp_path):
    project = write_project(tmp_path, reward=TWO, task={"reward": [*PARTS, {"name": "judge", "weight": 1}]})
    (tmp_path / "judge").mkdir()
    config = load_config(project)
    names = [f"{tmp_path / 'reward.py'}:long", f"{tmp_path / 'reward.py'}:vowels", str(tmp_path / "judge")]
    for found in (config.task.reward, absolute_paths(config).task.reward):
        assert [(part.name, part.called) for part in found] == list(zip(names, ["long", "aeiou", "judge"], strict=True))


LONG = {"name": "reward.py:long"}
NO_REWARD = [([{**LONG, "wieght": 1}], ["part 1", "'wieght'", "'weight'"]), ([{"weight": 1}], ["part 1: name"])]
NO_REWARD += [([{**LONG, "weight": bad}], ["part 1: weight", named]) for bad, named in (("x", "'x'"), (math.inf, "inf"))]
NO_REWARD += [([LONG, {"name": "other.py:long"}], ["'long'"]), ([{**LONG, "weight": 0}], ["weight"]), ([], ["weight"])]
NO_REWARD += [([{**LONG, "label": "a b"}], ["'a b'"]), (["reward.py:long"], ["part 1", "'reward.py:long'"])]


@pytest.mark.parametrize(("reward", "named"), NO_REWARD)
def test_parts_that_make_no_reward_are_one_line(tmp_path, reward, named):
    project = write_project(tmp_path, reward=TWO, task={"reward": reward})
    run_cli("ppo", project).refused(f"{project}: task.reward: ", *named)


def test_a_reward_model_is_a_part_of_a_mixed_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RewardModel(model_folder(), PAIRS, run_folder="runs", **FAST | {"epochs": 2}).learn().save("judge")
    parts = [{"name": "judge", "weight": 0.5}, {"name": "reward.py:long", "weight": 0.1}]
    project = write_project(tmp_path, reward=TWO, task={"reward": parts})
    assert (done := run_cli("ppo", project, "--run.folder", "runs", "--device", "cpu")).code == 0, done.err
    samples = rows(Path("runs/ppo-1"), "samples.jsonl")
    texts = [one["prompt"] for one in samples], [one["completion"] for one in samples]
    loaded = RewardModel.load("judge")
    scores = loaded.score(*texts)
    assert [one["reward"]["part/judge"] for one in samples] == pytest.approx(scores, abs=1e-4)
    total = [0.5 * value + 0.1 * len(text) for value, text in zip(scores, texts[1], strict=True)]
    assert [one["reward"]["reward"] for one in samples] == pytest.approx(total, abs=1e-4)
    # The same from Python.
    env = TextTask(["film 1 is"], {"judge": (loaded, 0.5), "long": (long, 0.1)}, held_out=0.0)
    assign_rewards(env.reward, [answer := trajectory(texts[1][0], prompt=texts[0][0])])
    assert answer.reward == pytest.approx(total[0], abs=1e-4)
    # What a part lacks is said before any model is loaded.
    monkeypatch.setattr("surefoot.build.language.load_policy", None)
    for name, named in (("reward.py:short", "'short'"), ("model", "reward model")):
        found = run_cli("ppo", project, "--task.reward", json.dumps([{"name": "judge"}, {"name": name}]))
        found.refused(f"task.reward, {name.split(':')[-1]}: ", named)

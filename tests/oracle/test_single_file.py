"""The pages of `examples/single_file` and the package are two programs for one algorithm: their numbers are equal.

`ppo_lm.py` reads one completion at a time, without cache, padding, mask or micro-batch, and sums up advantages as they are
defined; `ppo_gym.py` is held against both ways in which the package finds a gradient, autograd and the one written out.
"""

import ast
import contextlib
import copy
import functools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import gymnasium
import pytest
import torch

from surefoot import PPO
from surefoot.build.training import build_objective, build_rollout, build_training
from surefoot.config import field_table, make_config, nested, set_field, setting_keys
from surefoot.envs.text import TextTask
from surefoot.policies.control import fast_mlp
from surefoot.policies.lm.policy import CausalLMPolicy, wrap_policy
from surefoot.train import loop
from tests.recipes import load
from tests.tiny import tiny_lm, tiny_tokenizer

PAGES = Path(__file__).parents[2] / "examples" / "single_file"
Metrics = list[dict[str, float]]

# Prompts of several lengths, five of them: passes over the prompts and updates begin at different episodes.
PROMPTS = ["abc the ", "hello you ", "x", "the end and then ", "why: 1"]
END_TOKENS = [1, 8, 20, 33, 47, 60]  # so many that about half of the completions end before the limit of 7 tokens
LM_RUN = {"seed": 3, "total_episodes": 48, "episodes_per_update": 12, "batch_size": 4, "n_epochs": 2, "learning_rate": 3e-4}
LM_RUN |= {"max_new_tokens": 7, "temperature": 1.0}
GYM_RUN = {"seed": 3, "total_timesteps": 1024, "n_envs": 4, "n_steps": 64, "batch_size": 48, "n_epochs": 3}
GYM_RUN |= {"learning_rate": 1e-3, "lr_schedule": "constant"}

# The page's name -> the package's, a factor, and the absolute part of the tolerance; the relative part is 1e-5 for all.
# Log-probs near -4 are known to half a unit of their last place, 2.4e-7. `kl` sums their differences over a completion; the
# policy loss is a mean of terms of size one that nearly cancel; `approx_kl` is about the square of such a difference, halved.
# Of environments the package halves (V - R)²; returns and values of CartPole are near 10, the gradient's norm with them.
COMPARED = {
    "policy_loss": ("ppo/policy_loss", 1.0, 1e-6),
    "entropy": ("policy/entropy", 1.0, 1e-6),
    "approx_kl": ("ppo/approx_kl", 1.0, 1e-7),
    "clip_fraction": ("ppo/clip_fraction", 1.0, 1e-7),
    "grad_norm": ("ppo/grad_norm", 1.0, 1e-5),
}
LM_COMPARED = COMPARED | {"reward": ("reward/mean", 1.0, 1e-6), "kl": ("kl/reference", 1.0, 5e-6)}
LM_COMPARED |= {"kl_coef": ("kl/coef", 1.0, 1e-8), "value_loss": ("critic/value_loss", 1.0, 1e-7)}
GYM_COMPARED = COMPARED | {"timesteps": ("timesteps", 1.0, 0.0), "return": ("rollout/ep_rew_mean", 1.0, 1e-9)}
GYM_COMPARED |= {"value_loss": ("critic/value_loss", 0.5, 1e-6)}
# A module of the page -> the package's.
MODULES = {"actor.4": "head.linear", "critic.4": "value_head", "actor": "layers.policy", "critic": "layers.value"}
MODULES |= {"log_std": "head.log_std"}

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "entropy_bonus": {"ent_coef": 0.05},
    "trust_region": {"target_kl": 1e-3},
    "plain_advantages": {"normalize_advantage": False, "max_grad_norm": 1000.0},
    "linear_schedule": {"lr_schedule": "linear"},
}
LM_CASES = CASES | {
    "policy_clip": {"clip_range": 0.05},
    "value_clip": {"clip_range_vf": 0.005, "vf_coef": 1.0},
    "missing_eos_penalty": {"missing_eos_penalty": 0.7},
    "discount": {"gamma": 0.95, "gae_lambda": 0.9},
    "adaptive_kl": {"kl_target": 0.05, "kl_horizon": 20.0},
    "whitened_rewards": {"whiten_rewards": True},
    "temperature": {"temperature": 0.7},
}
GYM_CASES = CASES | {  # `env` and `kwargs` say what is played, everything else is a setting
    "policy_clip": {"clip_range": 0.01},
    "value_clip": {"clip_range_vf": 0.05},
    "truncation": {"kwargs": {"max_episode_steps": 12}},
    "discount": {"gamma": 0.9, "gae_lambda": 0.8},
    "whole_batch": {"batch_size": 256},
    "continuous": {"env": "Pendulum-v1", "kwargs": {"max_episode_steps": 50}, "gamma": 0.9, "ent_coef": 0.01},
}
# What must have been counted at least once, or equality would say nothing about it.
COUNTED = {"policy_clip": "ppo/clip_fraction", "value_clip": "critic/clip_fraction", "trust_region": "ppo/stopped_early"}


@functools.cache
def page(name: str) -> ModuleType:
    return load(f"examples/single_file/{name}.py")


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """Differs between completions, and between prompts in its sign: values rise and fall."""
    by_text = [0.4 * text.count("the") + 0.3 * sum(map(text.count, "aeiou")) - 0.15 * len(text) for text in completions]
    return [value + 0.1 * (len(prompt) - 7) for prompt, value in zip(prompts, by_text, strict=True)]


def language_model(family: str) -> Any:
    """Its distributions are broad but not flat, and it knows several end tokens."""
    lm = tiny_lm(family, initializer_range=0.15)
    lm.generation_config.eos_token_id = END_TOKENS
    return lm


def packages_key(name: str) -> str:
    """The package's dotted key of a setting of the page."""
    within = {f"kl_{leaf}": f"kl.{leaf}" for leaf in ("coef", "target", "horizon")}
    within |= {"missing_eos_penalty": "shaping.missing_eos_penalty", "whiten_rewards": "shaping.whiten"}
    return within.get(name) or setting_keys()[name]


def lm_page_run(lm: Any, settings: dict[str, Any]) -> tuple[Any, Metrics]:
    rows: Metrics = []
    module = page("ppo_lm")
    return module.train(lm, tiny_tokenizer(), PROMPTS, reward, module.Settings(**settings), report=rows.append), rows


def lm_package_run(lm: Any, settings: dict[str, Any], folder: Path) -> tuple[CausalLMPolicy, Metrics]:
    """The package's own loop, with five cache slots for twelve episodes and two completions or so in a micro-batch."""
    ours = {"run_folder": str(folder), "run_name": "oracle", "adapter": None, "dtype": "float32"}
    data = nested({"device": "cpu", "slots": 5, "micro_batch_tokens": 40, **ours})
    for name, value in settings.items():
        set_field(data, packages_key(name), str(value))
    config = make_config(data, where="test")
    policy = wrap_policy(lm, tiny_tokenizer(), config=config.policy)
    task = TextTask(PROMPTS, reward, held_out=[])
    rollout = build_rollout(config, policy, task)
    training = build_training(config, policy, task, (rollout, build_objective(config, policy, rollout)))
    training.observers = [observer := Mock()]
    loop.run(training)
    return policy, [call.args[0] for call in observer.log.call_args_list]


def gym_page_run(settings: dict[str, Any]) -> tuple[Any, Metrics]:
    settings, rows = dict(settings), []
    make = functools.partial(gymnasium.make, settings.pop("env", "CartPole-v1"), **settings.pop("kwargs", {}))
    with torch.random.fork_rng():
        return page("ppo_gym").train(make, page("ppo_gym").Settings(**settings), report=rows.append), rows


def gym_package_run(settings: dict[str, Any], folder: Path) -> tuple[Any, Metrics]:
    settings = dict(settings)
    env, kwargs = settings.pop("env", "CartPole-v1"), settings.pop("kwargs", {})
    settings |= {"run_folder": str(folder), "evaluate_episodes": 0, "device": "cpu", "verbose": 0}
    model = PPO("MlpPolicy", env, env_kwargs=kwargs, **settings)
    lines = (Path(model.learn().run_folder or "") / "metrics.jsonl").read_text().splitlines()
    return model.policy, [json.loads(line) for line in lines]


@functools.cache
def last_grad_norm(of_language: bool) -> float:
    """Of a page's run with the defaults."""
    _, rows = lm_page_run(language_model("llama"), LM_RUN) if of_language else gym_page_run(GYM_RUN)
    return rows[-1]["grad_norm"]


def assert_equal_rows(case: str, rows: Metrics, package_rows: Metrics, compared: dict[str, tuple[str, float, float]]) -> None:
    assert len(rows) == len(package_rows) == 4
    assert case not in COUNTED or any(row[COUNTED[case]] > 0 for row in package_rows)
    # A setting that both programs ignore would pass all that follows.
    assert case == "defaults" or rows[-1]["grad_norm"] != last_grad_norm(compared is LM_COMPARED)
    for update, (row, package_row) in enumerate(zip(rows, package_rows, strict=True)):
        for name, (package_name, factor, absolute) in compared.items():
            expected = pytest.approx(factor * row[name], rel=1e-5, abs=absolute)
            assert package_row[package_name] == expected, f"{name} in update {update}"


def largest_difference(some_parameters: Any, others: Any) -> float:
    pairs = zip(some_parameters, others, strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("case", "family"), [*((case, "llama") for case in LM_CASES), ("defaults", "gpt2")])
def test_page_and_package_agree(case: str, family: str, tmp_path: Path) -> None:
    settings, untrained = {**LM_RUN, **LM_CASES[case]}, language_model(family)
    lm_of_page, lm_of_package = copy.deepcopy(untrained), copy.deepcopy(untrained)
    page_policy, rows = lm_page_run(lm_of_page, settings)
    package_policy, package_rows = lm_package_run(lm_of_package, settings, tmp_path)
    assert any(0 < row["length/end_rate"] < 1 for row in package_rows)
    assert_equal_rows(case, rows, package_rows, LM_COMPARED)
    assert largest_difference(lm_of_package.parameters(), lm_of_page.parameters()) < 1e-6
    assert largest_difference(package_policy.value_head.parameters(), page_policy.critic.parameters()) < 1e-6
    # A hundred and more times the tolerance: there was something to be equal in.
    assert largest_difference(lm_of_page.parameters(), untrained.parameters()) > 1e-3
    assert package_policy.value_head.weight.abs().max() > 1e-4


@pytest.fixture
def _one_thread():
    """As the page's `main` and the package have it for a network of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("gradient", ["fast", "autograd"])
@pytest.mark.parametrize("case", GYM_CASES)
def test_page_and_package_agree_in_environments(case: str, gradient: str, tmp_path: Path, monkeypatch: Any) -> None:
    settings, asked, supports = {**GYM_RUN, **GYM_CASES[case]}, [], fast_mlp.supports

    def only_if_fast(*arguments: Any) -> bool:
        asked.append(gradient == "fast" and supports(*arguments))
        return asked[-1]

    monkeypatch.setattr(fast_mlp, "supports", only_if_fast)
    page_policy, rows = gym_page_run(settings)
    package_policy, package_rows = gym_package_run(settings, tmp_path)
    assert set(asked) == {gradient == "fast"}
    assert_equal_rows(case, rows, package_rows, GYM_COMPARED)
    theirs, size = dict(package_policy.named_parameters()), page_policy.actor[0].in_features
    space = gymnasium.make(settings.get("env", "CartPole-v1")).action_space
    with torch.random.fork_rng():
        untrained = dict(page("ppo_gym").Policy(size, space, GYM_RUN["seed"]).named_parameters())
    for name, parameter in page_policy.named_parameters():
        counterpart = next(name.replace(ours, package) for ours, package in MODULES.items() if name.startswith(ours))
        assert largest_difference([parameter], [theirs.pop(counterpart)]) < 5e-7, name
        assert largest_difference([parameter], [untrained[name]]) > 1e-4, name  # or equality is that of what stood still
    assert not theirs


@pytest.mark.parametrize(("name", "needs"), [("ppo_lm", {"transformers"}), ("ppo_gym", {"numpy", "gymnasium"})])
def test_the_page_is_a_page_and_needs_no_other_and_its_settings_are_the_packages(name: str, needs: set[str]) -> None:
    nodes = list(ast.walk(ast.parse((PAGES / f"{name}.py").read_text())))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch", *needs}
    assert {packages_key(key) for key in page(name).Settings.__dataclass_fields__} <= {key for key, *_ in field_table()}


@pytest.fixture
def script(monkeypatch: Any, capsys: Any, _one_thread: None) -> Callable[..., list[str]]:
    """Runs a page as a program; the lines that it prints."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with contextlib.suppress(SystemExit), torch.random.fork_rng():
            runpy.run_path(str(PAGES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_scripts_explain_themselves(script: Any) -> None:
    lm, gym = ("--model", "--episodes", "--kl-coef", "(default 0.05)"), ("--env", "--timesteps", "(default 0.95)")
    for name, flags in (("ppo_lm", lm), ("ppo_gym", gym)):
        shown = "\n".join(script(name, "--help"))
        assert all(flag in shown for flag in flags)


def test_the_scripts_learn(script: Any) -> None:
    rewards = [float(line.split()[3]) for line in script("ppo_lm", "--episodes", "384") if line.startswith("update")]
    # Untrained, 5 of 27 letters are vowels: the first means lie near 0.17, each within 0.04 or so (128 letters).
    assert len(rewards) == 24 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    # An untrained policy keeps the pole up for some 20 steps, and the mean is over the latest 100 episodes.
    *updates, last = script("ppo_gym", "--timesteps", "16384")
    returns = [float(line.split()[5]) for line in updates]
    assert len(returns) == 16 and returns[0] < 40 and returns[-1] > 60 and float(last.split()[-1]) > 60


def test_the_scripts_take_a_model_folder_and_another_environment(script: Any, tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lines = script("ppo_lm", "--model", str(tmp_path), "--episodes", "32", "--max-new-tokens", "3")
    assert [line.split()[:2] for line in lines[:2]] == [["update", "1"], ["update", "2"]] and len(lines) == 6
    *updates, last = script("ppo_gym", "--env", "Pendulum-v1", "--timesteps", "2048", "--n-epochs", "1")
    assert len(updates) == 2 and -2000 < float(last.split()[-1]) < 0

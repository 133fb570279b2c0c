"""The page `examples/single_file/ppo_lm.py` and the package are two programs for one algorithm: their numbers are equal.

The page reads one completion at a time, without cache, padding, mask or micro-batch, and sums up advantages as they are
defined; whatever the package does for speed must not show.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from surefoot.build.training import build_objective, build_rollout, build_training
from surefoot.config import field_table, make_config, nested, set_field, setting_keys
from surefoot.envs.text import TextTask
from surefoot.policies.lm.policy import CausalLMPolicy, wrap_policy
from surefoot.train import loop
from tests.tiny import tiny_lm, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "examples" / "single_file" / "ppo_lm.py"

# Prompts of several lengths, five of them: passes over the prompts and updates begin at different episodes.
PROMPTS = ["abc the ", "hello you ", "x", "the end and then ", "why: 1"]
END_TOKENS = [1, 8, 20, 33, 47, 60]  # so many that about half of the completions end before the limit of 7 tokens
RUN = {"seed": 3, "total_episodes": 48, "episodes_per_update": 12, "batch_size": 4, "n_epochs": 2, "learning_rate": 3e-4}
SAMPLING = {"max_new_tokens": 7, "temperature": 1.0}

# The page's name -> the package's, and the absolute part of the tolerance; the relative part is 1e-5 for all. Log-probs
# near -4 are known to half a unit of their last place, 2.4e-7. `kl` sums their differences over a completion; the policy
# loss is a mean of terms of size one that nearly cancel; `approx_kl` is about the square of such a difference, halved.
COMPARED = {
    "reward": ("reward/mean", 1e-6),
    "kl": ("kl/reference", 5e-6),
    "kl_coef": ("kl/coef", 1e-8),
    "policy_loss": ("ppo/policy_loss", 1e-6),
    "value_loss": ("critic/value_loss", 1e-7),
    "entropy": ("policy/entropy", 1e-6),
    "approx_kl": ("ppo/approx_kl", 1e-7),
    "clip_fraction": ("ppo/clip_fraction", 1e-7),
    "grad_norm": ("ppo/grad_norm", 1e-5),
}

Metrics = list[dict[str, float]]

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "policy_clip": {"clip_range": 0.05},
    "value_clip": {"clip_range_vf": 0.005, "vf_coef": 1.0},
    "missing_eos_penalty": {"missing_eos_penalty": 0.7},
    "discount": {"gamma": 0.95, "gae_lambda": 0.9},
    "adaptive_kl": {"kl_target": 0.05, "kl_horizon": 20.0},
    "entropy_bonus": {"ent_coef": 0.05},
    "trust_region": {"target_kl": 1e-3},
    "whitened_rewards": {"whiten_rewards": True},
    "plain_advantages": {"normalize_advantage": False, "max_grad_norm": 100.0},
    "linear_schedule": {"lr_schedule": "linear"},
    "temperature": {"temperature": 0.7},
}
# What must have been counted at least once, or equality would say nothing about it.
COUNTED = {"policy_clip": "ppo/clip_fraction", "value_clip": "critic/clip_fraction", "trust_region": "ppo/stopped_early"}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_lm", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_lm"] = module
    spec.loader.exec_module(module)
    return module


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


def package_run(lm: Any, settings: dict[str, Any], folder: Path) -> tuple[CausalLMPolicy, Metrics]:
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
    observer = Mock()
    training.observers = [observer]
    loop.run(training)
    return policy, [call.args[0] for call in observer.log.call_args_list]


def largest_difference(some_parameters: Any, others: Any) -> float:
    pairs = zip(some_parameters, others, strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("case", "family"), [*((case, "llama") for case in CASES), ("defaults", "gpt2")])
def test_page_and_package_agree(case: str, family: str, page: ModuleType, tmp_path: Path) -> None:
    settings = {**RUN, **SAMPLING, **CASES[case]}
    untrained = language_model(family)
    lm_of_page, lm_of_package = copy.deepcopy(untrained), copy.deepcopy(untrained)

    rows: Metrics = []
    page_policy = page.train(lm_of_page, tiny_tokenizer(), PROMPTS, reward, page.Settings(**settings), report=rows.append)
    package_policy, package_rows = package_run(lm_of_package, settings, tmp_path)

    assert len(rows) == len(package_rows) == 4
    assert any(0 < row["length/end_rate"] < 1 for row in package_rows)
    assert case not in COUNTED or any(row[COUNTED[case]] > 0 for row in package_rows)
    for row, package_row in zip(rows, package_rows, strict=True):
        for name, (package_name, absolute) in COMPARED.items():
            expected = pytest.approx(row[name], rel=1e-5, abs=absolute)
            assert package_row[package_name] == expected, f"{name} in update {row['update']}"
    assert largest_difference(lm_of_package.parameters(), lm_of_page.parameters()) < 1e-6
    assert largest_difference(package_policy.value_head.parameters(), page_policy.critic.parameters()) < 1e-6
    # A hundred and more times the tolerance: there was something to be equal in.
    assert largest_difference(lm_of_page.parameters(), untrained.parameters()) > 1e-3
    assert package_policy.value_head.weight.abs().max() > 1e-4


def test_every_case_changes_the_run(page: ModuleType) -> None:
    """Otherwise two of them would be one, and a setting that both programs ignore would pass."""
    ends = {}
    for case, changes in CASES.items():
        rows: Metrics = []
        settings = page.Settings(**{**RUN, **SAMPLING, "total_episodes": 24, **changes})
        lm = language_model("llama")
        page.train(lm, tiny_tokenizer(), PROMPTS, reward, settings, report=rows.append)
        ends[case] = float(lm.get_output_embeddings().weight.detach().double().sum())
    assert len(set(ends.values())) == len(CASES), ends


def test_the_page_is_a_page_and_needs_no_other() -> None:
    source = PAGE.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"torch", "transformers"} <= imported
    assert imported <= {"torch", "transformers", *sys.stdlib_module_names}


def test_its_settings_are_the_packages(page: ModuleType) -> None:
    assert {packages_key(name) for name in page.Settings.__dataclass_fields__} <= {key for key, *_ in field_table()}


def script(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PAGE), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_script_explains_itself_and_learns_without_a_model() -> None:
    assert all(flag in script("--help") for flag in ("--model", "--episodes", "--kl-coef", "(default 0.05)"))
    rewards = [float(line.split()[3]) for line in script("--episodes", "384").splitlines() if line.startswith("update")]
    assert len(rewards) == 24
    # Untrained, 5 of 27 letters are vowels: the first means lie near 0.17, each within 0.04 or so (128 letters).
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1


def test_the_script_takes_a_model_folder(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        language_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lines = script("--model", str(tmp_path), "--episodes", "32", "--max-new-tokens", "3").splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["update", "1"], ["update", "2"]]
    assert len(lines) == 6

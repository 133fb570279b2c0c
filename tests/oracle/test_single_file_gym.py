"""The page `examples/single_file/ppo_gym.py` and the package are two programs for one algorithm: their numbers are equal.

Both ways in which the package finds a gradient are held to it: autograd, and the gradient of small networks written out.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import pytest
import torch

from surefoot import PPO
from surefoot.config import setting_keys
from surefoot.policies.control import fast_mlp

PAGE = Path(__file__).parents[2] / "examples" / "single_file" / "ppo_gym.py"

RUN = {"seed": 3, "total_timesteps": 1024, "n_envs": 4, "n_steps": 64, "batch_size": 48, "n_epochs": 3, "learning_rate": 1e-3}
RUN |= {"lr_schedule": "constant"}

# The page's name -> the package's, a factor, and the absolute part of the tolerance; the relative part is 1e-5 for all. The
# package halves (V - R)². Log-probs near -0.7 are known to 6e-8; returns and values of CartPole are near 10, and the
# gradient's norm with them; `approx_kl` is about the square of a log-prob's difference, halved.
COMPARED = {
    "timesteps": ("timesteps", 1.0, 0.0),
    "return": ("rollout/ep_rew_mean", 1.0, 1e-9),
    "policy_loss": ("ppo/policy_loss", 1.0, 1e-6),
    "value_loss": ("critic/value_loss", 0.5, 1e-6),
    "entropy": ("policy/entropy", 1.0, 1e-6),
    "approx_kl": ("ppo/approx_kl", 1.0, 1e-7),
    "clip_fraction": ("ppo/clip_fraction", 1.0, 1e-7),
    "grad_norm": ("ppo/grad_norm", 1.0, 1e-5),
}
# A module of the page -> the package's.
MODULES = {
    "actor.4": "head.linear",
    "critic.4": "value_head",
    "actor": "layers.policy",
    "critic": "layers.value",
    "log_std": "head.log_std",
}

Metrics = list[dict[str, float]]

# `env` and `kwargs` say what is played, everything else is a setting.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "policy_clip": {"clip_range": 0.01},
    "value_clip": {"clip_range_vf": 0.05},
    "truncation": {"kwargs": {"max_episode_steps": 12}},
    "discount": {"gamma": 0.9, "gae_lambda": 0.8},
    "entropy_bonus": {"ent_coef": 0.05},
    "trust_region": {"target_kl": 1e-3},
    "plain_advantages": {"normalize_advantage": False, "max_grad_norm": 1000.0},
    "linear_schedule": {"lr_schedule": "linear"},
    "whole_batch": {"batch_size": 256},
    "continuous": {"env": "Pendulum-v1", "kwargs": {"max_episode_steps": 50}, "gamma": 0.9, "ent_coef": 0.01},
}
# What must have been counted at least once, or equality would say nothing about it.
COUNTED = {"policy_clip": "ppo/clip_fraction", "value_clip": "critic/clip_fraction", "trust_region": "ppo/stopped_early"}


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ppo_gym", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_gym"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the page's `main` and the package do for a network of this size
    yield module
    torch.set_num_threads(threads)


def page_run(page: ModuleType, settings: dict[str, Any]) -> tuple[Any, Metrics]:
    settings = dict(settings)
    make = functools.partial(gymnasium.make, settings.pop("env", "CartPole-v1"), **settings.pop("kwargs", {}))
    rows: Metrics = []
    with torch.random.fork_rng():
        return page.train(make, page.Settings(**settings), report=rows.append), rows


def package_run(settings: dict[str, Any], folder: Path) -> tuple[Any, Metrics]:
    settings = dict(settings)
    env, kwargs = settings.pop("env", "CartPole-v1"), settings.pop("kwargs", {})
    model = PPO(
        "MlpPolicy", env, env_kwargs=kwargs, run_folder=str(folder), evaluate_episodes=0, device="cpu", verbose=0, **settings
    )
    lines = (Path(model.learn().run_folder or "") / "metrics.jsonl").read_text().splitlines()
    return model.policy, [json.loads(line) for line in lines]


def counterpart(name: str) -> str:
    """The package's name of a parameter of the page."""
    return next(name.replace(ours, theirs) for ours, theirs in MODULES.items() if name.startswith(ours))


@pytest.mark.parametrize("gradient", ["fast", "autograd"])
@pytest.mark.parametrize("case", CASES)
def test_page_and_package_agree(
    case: str, gradient: str, page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, **CASES[case]}
    asked: list[bool] = []
    supports = fast_mlp.supports

    def only_if_fast(*arguments: Any) -> bool:
        asked.append(gradient == "fast" and supports(*arguments))
        return asked[-1]

    monkeypatch.setattr(fast_mlp, "supports", only_if_fast)
    page_policy, rows = page_run(page, settings)
    package_policy, package_rows = package_run(settings, tmp_path)

    assert set(asked) == {gradient == "fast"}
    assert len(rows) == len(package_rows) == 4
    assert case not in COUNTED or any(row[COUNTED[case]] > 0 for row in package_rows)
    for row, package_row in zip(rows, package_rows, strict=True):
        for name, (package_name, factor, absolute) in COMPARED.items():
            expected = pytest.approx(factor * row[name], rel=1e-5, abs=absolute)
            assert package_row[package_name] == expected, f"{name} in update {row['update']}"
    ours, theirs = dict(page_policy.named_parameters()), dict(package_policy.named_parameters())
    assert {counterpart(name) for name in ours} == theirs.keys()
    for name, parameter in ours.items():
        assert float((parameter - theirs[counterpart(name)]).abs().max().detach()) < 5e-7, name


def test_every_case_changes_the_run(page: ModuleType) -> None:
    """Otherwise two of them would be one, and a setting that both programs ignore would pass."""
    short = {**RUN, "total_timesteps": 512}
    ends = {
        case: float(page_run(page, short | changes)[0].critic[0].weight.detach().double().sum())
        for case, changes in CASES.items()
    }
    assert len(set(ends.values())) == len(CASES), ends


def test_training_moves_every_parameter_by_far_more_than_the_tolerance(page: ModuleType) -> None:
    """Or equality would be that of what stood still."""
    for case in ("defaults", "continuous"):
        policy, _ = page_run(page, {**RUN, **CASES[case]})
        size, space = policy.actor[0].in_features, gymnasium.make(CASES[case].get("env", "CartPole-v1")).action_space
        with torch.random.fork_rng():
            untrained = dict(page.Policy(size, space, RUN["seed"]).named_parameters())
        assert all(float((p - untrained[name]).abs().max().detach()) > 1e-3 for name, p in policy.named_parameters())


def test_the_page_is_a_page_and_needs_no_other() -> None:
    source = PAGE.read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "numpy", "gymnasium"}


def test_its_settings_are_the_packages(page: ModuleType) -> None:
    assert set(page.Settings.__dataclass_fields__) <= set(setting_keys())


def script(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(PAGE), *arguments], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_the_settings() -> None:
    shown = script("--help")
    assert all(words in shown for words in ("--env", "--timesteps", "--gae-lambda", "(default 0.95)"))


def test_the_script_learns() -> None:
    *updates, last = script("--timesteps", "16384").splitlines()
    returns = [float(line.split()[5]) for line in updates]
    assert len(returns) == 16
    # An untrained policy keeps the pole up for some 20 steps, and the mean is over the latest 100 episodes.
    assert returns[0] < 40 and returns[-1] > 60
    assert float(last.split()[-1]) > 60


def test_the_script_takes_another_environment() -> None:
    *updates, last = script("--env", "Pendulum-v1", "--timesteps", "2048", "--n-epochs", "1").splitlines()
    assert len(updates) == 2 and -2000 < float(last.split()[-1]) < 0

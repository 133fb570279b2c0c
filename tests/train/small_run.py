"""A run small enough to be killed many times: a random model on disk, a reward that draws random numbers, a config."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from surefoot import PPO, TextTask
from surefoot.config import make_config
from tests.tiny import tiny_lm, tiny_tokenizer

REWARD = """
import random
import numpy
import torch

def reward(prompts, completions, **columns):
    noise = lambda: random.gauss(0, 0.1) + 0.1 * numpy.random.standard_normal() + 0.1 * float(torch.randn(()))
    return [sum(letter in "aeiou" for letter in text) + noise() for text in completions]

def metric(prompts, completions, **columns):
    return [len(set(text)) + 0.001 * random.random() for text in completions]
"""
UPDATES, EPISODES = 6, 6  # updates in the run, episodes in each
PROMPTS = [f"{word} {number}" for word in ("the", "an", "in", "our") for number in range(4)]
RATES = {"learning_rate": 0.01, "lr_schedule": "linear", "lr_warmup": 0.3}
CONFIG: dict[str, Any] = {
    "seed": 5,
    "device": "cpu",
    "run": {"name": "run", "folder": "runs", "checkpoint_every": 2, "keep_checkpoints": 2},
    "policy": {"model": "base", "dtype": "float32", "adapter": {"rank": 2}},
    "task": {"prompts": "prompts.jsonl", "reward": "reward.py:reward", "metric": "reward.py:metric", "held_out": 0.3},
    "generation": {"max_new_tokens": 5, "slots": 4},
    "ppo": {"batch_size": 3, "n_epochs": 2, "micro_batch_tokens": 40, **RATES},
    "rollout": {"total_episodes": UPDATES * EPISODES, "episodes_per_update": EPISODES},
    "kl": {"coef": 0.1, "target": 0.05, "horizon": 50.0},
    "shaping": {"scale": "running_std"},
    "evaluate": {"every": 1, "episodes": 3},
}


def write_base(folder: Path, *, family: str = "llama", seed: int = 0) -> None:
    """A random model and its tokenizer, as a Hugging Face folder."""
    tiny_lm(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_project(folder: Path, base: Path, *, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Config, prompts and reward function in `folder`, over the model in `base`; the run's folder to be."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in CONFIG.items()}
    config = {**sections, **own}
    config["run"] = {**config["run"], "name": name}
    config["policy"] = {**config["policy"], "model": str(base)}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(config))
    (folder / "reward.py").write_text(REWARD)
    write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in PROMPTS))
    return folder / "runs" / name


def write_supervised(folder: Path, model: Path, config: dict[str, Any], *, command: str, **sections: dict[str, Any]) -> Path:
    """`<command>.yaml` in `folder`, `sections` merged over `config`; the run's folder to be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in config.items()}
    config["policy"]["model"] = str(model)
    (folder / f"{command}.yaml").write_text(yaml.safe_dump(config))
    return folder / "runs" / "run"


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def python_ppo(base: Path, folder: Path, reward: Any = None, *, name: str = "run", **sections: dict[str, Any]) -> PPO:
    """The same run made in Python, where the task is no part of the config; nothing random in its reward by default."""
    config = {key: {**CONFIG[key], **sections.get(key, {})} for key in CONFIG if key not in ("seed", "device", "task")}
    config["run"] = {**config["run"], "name": name, "folder": str(folder / "runs")}
    config["policy"] = {**config["policy"], "model": str(base)}
    data = {"seed": CONFIG["seed"], "device": "cpu", **config}
    return PPO(str(base), python_task(reward), config=make_config(data, where="test"), verbose=0)


def python_task(reward: Any = None) -> TextTask:
    return TextTask(PROMPTS, reward or letters, held_out=0.3)


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 2 for text in completions]


def noisy_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [score + random.gauss(0, 0.1) for score in letters(prompts, completions)]


def weights(model: PPO) -> dict[str, Any]:
    """A copy of everything that a model trains."""
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters_to_train()}


def same_weights(left: PPO, right: PPO) -> bool:
    first, second = weights(left), weights(right)
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def rows(run: Path, log: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A log without what the clock says."""
    lines = [json.loads(line) for line in (run / log).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "throughput/"))} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on whether it was ever interrupted."""
    found = {"metrics": rows(run), "samples": (run / "samples.jsonl").read_bytes()}
    if (run / "completions.jsonl").exists():
        return found | {"examples": (run / "completions.jsonl").read_text()}
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    state = json.loads((newest / "state.json").read_text())
    del state["progress"]["seconds"], state["log_sizes"]["metrics.jsonl"]
    return found | {
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "best": (run / "checkpoints" / "best").read_text() if (run / "checkpoints" / "best").exists() else None,
        "state": state,
        **{file.stem: _digests(file) for file in newest.glob("*.safetensors")},
        "model": {file.name: _digests(file) for file in (run / "model").glob("*.safetensors")},
    }


def assert_equal(run: Path, expected: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """The run's outcome is `expected`, part for part."""
    found = outcome(run)
    for part, value in expected.items():  # what is seen first comes first
        assert part in but or found[part] == value, part


def _digests(file: Path) -> dict[str, str]:
    return {
        name: f"{tuple(tensor.shape)} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
        for name, tensor in load_file(file).items()
    }

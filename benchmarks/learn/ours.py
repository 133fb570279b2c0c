"""Surefoot on one task and one seed of `tasks.json`: trains, evaluates 100 (slow tasks: 20) fresh episodes, writes JSON.

Our side of the learning comparison; `peer_sb3.py` is the other, with the same command line and the same JSON. Run:

    python benchmarks/learn/ours.py CartPole-v1 --seed 0 --output ours_CartPole-v1_0.json

Returns are the true ones: unclipped and unnormalized. `seconds` counts training alone (with the run folder, its metrics and
its checkpoints), set-up and evaluation excluded. Atari is ale-py's vectorized form; SB3 has the same wrappers in Python.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from surefoot import PPO, __version__
from surefoot.build.control import build_vector
from surefoot.rollout.gym import run_episodes

RECIPES = Path(__file__).parents[2] / "recipes"
AS_THEY_ARE = (
    "n_steps",
    "batch_size",
    "gamma",
    "gae_lambda",
    "n_epochs",
    "ent_coef",
    "vf_coef",
    "use_sde",
    "sde_sample_freq",
)
SCHEDULED = {"learning_rate": "lr_schedule", "clip_range": "clip_schedule"}
EVAL_ENVS = 10  # divides every number of evaluation episodes, so no env contributes more (shorter) episodes than another
EVAL_SEED = 10_000
POINTS = 100  # at most, on a learning curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, help="instead of the task's total_timesteps")
    parser.add_argument("--tasks", type=Path, default=Path(__file__).with_name("tasks.json"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = json.loads(options.tasks.read_text())[options.task]
    total = options.timesteps or task["total_timesteps"]

    with tempfile.TemporaryDirectory() as folder:
        model = build(task, options.seed, folder)
        _ = model._session.training  # the optimiser: SB3's constructor makes its own
        start = time.perf_counter()
        model.learn(total_timesteps=total)
        seconds = time.perf_counter() - start
        assert model.run_folder is not None
        timesteps, episodes = read(model.run_folder)
    result = {
        "library": f"surefoot {__version__}",
        "task": options.task,
        "seed": options.seed,
        "timesteps": timesteps[-1],
        "seconds": round(seconds, 2),
        "curve": curve(timesteps, episodes, every=total / POINTS),
        "training": outcomes(episodes),
        "final": evaluate(task, model, EVAL_SEED + options.seed),
    }
    options.output.write_text(json.dumps(result) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}))


def build(task: dict[str, Any], seed: int, folder: str) -> PPO:
    """The task's policy and environments, by Stable-Baselines3's keywords."""
    settings: dict[str, Any] = {name: task[name] for name in AS_THEY_ARE}
    for name, schedule in SCHEDULED.items():
        is_line = isinstance(task[name], str)
        settings[name] = float(str(task[name]).removeprefix("lin_"))
        settings[schedule] = "linear" if is_line else "constant"
    policy_kwargs = dict(task["policy_kwargs"])
    if "activation_fn" in policy_kwargs:
        policy_kwargs["activation_fn"] = getattr(torch.nn, policy_kwargs["activation_fn"])
    env, wrapping = environment(task)
    return PPO(
        task["policy"],
        env,
        max_grad_norm=float(task["max_grad_norm"]),
        policy_kwargs=policy_kwargs,
        n_envs=task["n_envs"],
        normalize_observations=task["normalize"],
        normalize_rewards=task["normalize"],
        evaluate_episodes=0,
        run_folder=folder,
        run_checkpoint_every=10**9,
        seed=seed,
        device="cpu",
        verbose=0,
        **settings,
        **wrapping,
    )


def environment(task: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The environment's id, and what it is made with."""
    if task.get("atari"):  # the settings that SB3's AtariWrapper has, as ale-py names them
        env = yaml.safe_load((RECIPES / "pong" / "ppo.yaml").read_text())["env"]
        return task["env"], {name: env[name] for name in ("vectorization", "eval_kwargs")} | {
            "env_kwargs": env["kwargs"]
        }
    if "observe" in task:
        assert (task["env"], task["observe"]) == ("CartPole-v1", [0, 2]), "the recipe shows these"
        return f"{RECIPES / 'cartpole_no_velocity' / 'env.py'}:make", {}
    return task["env"], {"env_kwargs": task.get("env_kwargs", {})}


def read(run: Path) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """Timesteps after each update, and the episodes that finished in it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timesteps = [int(row["timesteps"]) for row in rows if "timesteps" in row]
    episodes: list[list[dict[str, Any]]] = [[] for _ in timesteps]
    if (run / "samples.jsonl").exists():
        for line in (run / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            episodes[row["update"] - 1].append(row)
    return timesteps, episodes


def curve(
    timesteps: list[int], episodes: list[list[dict[str, Any]]], every: float
) -> list[tuple[int, float]]:
    """About every `every` timesteps, the mean return of the episodes that finished since the last point."""
    points, new, due = [], [], every
    for at, finished in zip(timesteps, episodes, strict=True):
        new += [episode["return"] for episode in finished]
        if (at >= due or at == timesteps[-1]) and new:
            points.append((at, float(np.mean(new))))
            new = []
        due = at + every if at >= due else due
    return points


def evaluate(task: dict[str, Any], model: PPO, seed: int) -> dict[str, float]:
    """The deterministic policy on fresh environments, under the training's observation statistics, frozen."""
    assert model.config.env is not None
    env = model.config.env.model_copy(update={"n_envs": EVAL_ENVS})
    vector = build_vector(model.config.model_copy(update={"seed": seed, "env": env}), for_evaluation=True)
    played = run_episodes(model.policy, vector, task["eval_episodes"])
    vector.close()
    returns = [episode.total for episode in played]
    return {
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        **outcomes([[e.record() for e in played]]),
    }


def outcomes(groups: list[list[dict[str, Any]]]) -> dict[str, float]:
    """How many episodes ended, their mean length and, where the environment says so, how many by a crash or a success."""
    ends = [end for group in groups for end in group]
    counts: dict[str, float] = {"episodes": len(ends)}
    if ends:
        counts["length"] = float(np.mean([end["steps"] for end in ends]))
    for key, total, rate in (
        ("crashed", "crashes", "crash_rate"),
        ("is_success", "successes", "success_rate"),
    ):
        flags = [bool(end[key]) for end in ends if key in end]
        if flags:
            counts |= {total: sum(flags), rate: sum(flags) / len(flags)}
    return counts


if __name__ == "__main__":
    main()

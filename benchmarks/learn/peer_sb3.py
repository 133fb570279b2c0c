"""Stable-Baselines3 on one task and one seed of `tasks.json`: trains, evaluates 100 (slow tasks: 20) fresh episodes, writes JSON.

The other side of the learning comparison, in a separate environment, so it imports nothing of Surefoot. Run:

    python benchmarks/learn/peer_sb3.py CartPole-v1 --seed 0 --output sb3_CartPole-v1_0.json

It needs stable-baselines3 and sb3-contrib; box2d, highway-env, ale-py and opencv-python for the tasks that use them.
Returns are the true ones: unclipped and unnormalized. `seconds` counts training alone, set-up and evaluation excluded.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

ALGORITHMS = {"ppo": PPO, "recurrent_ppo": RecurrentPPO}
AS_THEY_ARE = (
    "n_steps",
    "batch_size",
    "gamma",
    "gae_lambda",
    "n_epochs",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
)
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

    env = make_envs(task, task["n_envs"], options.seed)
    if task["normalize"]:
        env = VecNormalize(env, gamma=task["gamma"])
    model = build(task, env, options.seed)
    record = Record(every=(options.timesteps or task["total_timesteps"]) / POINTS)
    start = time.perf_counter()
    model.learn(options.timesteps or task["total_timesteps"], callback=record)
    seconds = time.perf_counter() - start

    result = {
        "library": f"stable-baselines3 {stable_baselines3.__version__}",
        "task": options.task,
        "seed": options.seed,
        "timesteps": model.num_timesteps,
        "seconds": round(seconds, 2),
        "curve": record.curve,
        "training": outcomes(record.ends),
        "final": evaluate(task, model, EVAL_SEED + options.seed),
    }
    options.output.write_text(json.dumps(result) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}))


def make_envs(task: dict[str, Any], count: int, seed: int) -> VecEnv:
    """The task's environments side by side in this process; each has a Monitor inside its wrappers, for true returns."""
    wrapper: Any = AtariWrapper if task.get("atari") else None
    if "observe" in task:
        wrapper = lambda env: Observe(env, task["observe"])
    env = make_vec_env(
        task["env"], count, seed=seed, env_kwargs=task.get("env_kwargs"), wrapper_class=wrapper
    )
    return VecFrameStack(env, task["frame_stack"]) if "frame_stack" in task else env


def build(task: dict[str, Any], env: VecEnv, seed: int) -> PPO | RecurrentPPO:
    policy_kwargs = dict(task["policy_kwargs"])
    if "activation_fn" in policy_kwargs:
        policy_kwargs["activation_fn"] = getattr(torch.nn, policy_kwargs["activation_fn"])
    return ALGORITHMS[task["algorithm"]](
        task["policy"],
        env,
        learning_rate=schedule(task["learning_rate"]),
        clip_range=schedule(task["clip_range"]),
        use_sde=task["use_sde"],
        sde_sample_freq=task["sde_sample_freq"],
        policy_kwargs=policy_kwargs,
        seed=seed,
        device="cpu",
        **{name: task[name] for name in AS_THEY_ARE},
    )


def schedule(value: float | str) -> float | Callable[[float], float]:
    """A constant, or for "lin_X" a line from X at the start to 0 at the end of training."""
    if isinstance(value, str):
        initial = float(value.removeprefix("lin_"))
        return lambda remaining: remaining * initial
    return value


def evaluate(task: dict[str, Any], model: PPO | RecurrentPPO, seed: int) -> dict[str, float]:
    """The deterministic policy on fresh environments, under the training's observation statistics, frozen."""
    env = make_envs(task, EVAL_ENVS, seed)
    trained = model.get_vec_normalize_env()
    if trained is not None:
        env = VecNormalize(env, training=False, norm_reward=False)
        env.obs_rms = copy.deepcopy(trained.obs_rms)
    ends: list[dict[str, Any]] = []
    note_end = lambda scope, _: ends.append(scope["info"]) if "episode" in scope["info"] else None
    evaluate_policy(model, env, task["eval_episodes"], deterministic=True, callback=note_end)
    returns = [end["episode"]["r"] for end in ends]
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), **outcomes(ends)}


def outcomes(ends: list[dict[str, Any]]) -> dict[str, float]:
    """How many episodes ended, their mean length and, where the environment says so, how many by a crash or a success."""
    counts: dict[str, float] = {"episodes": len(ends)}
    if ends:
        counts["length"] = float(np.mean([end["episode"]["l"] for end in ends]))
    for key, total, rate in (
        ("crashed", "crashes", "crash_rate"),
        ("is_success", "successes", "success_rate"),
    ):
        flags = [bool(end[key]) for end in ends if key in end]
        if flags:
            counts |= {total: sum(flags), rate: sum(flags) / len(flags)}
    return counts


class Observe(gymnasium.ObservationWrapper):
    """Keeps the observation's entries at `indices`."""

    def __init__(self, env: gymnasium.Env, indices: list[int]):
        super().__init__(env)
        space = env.observation_space
        self.indices = indices
        self.observation_space = gymnasium.spaces.Box(
            space.low[indices], space.high[indices], dtype=space.dtype
        )

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self.indices]


class Record(BaseCallback):
    """Collects finished episodes; every `every` timesteps adds the mean return of the new ones to the curve."""

    def __init__(self, every: float):
        super().__init__()
        self.every = every
        self.curve: list[tuple[int, float]] = []
        self.ends: list[dict[str, Any]] = []
        self.plotted = 0  # how many of `ends` the curve has
        self.due = every

    def _on_step(self) -> bool:
        keep = ("episode", "crashed", "is_success")
        self.ends += [
            {key: info[key] for key in keep if key in info}
            for info in self.locals["infos"]
            if "episode" in info
        ]
        if self.num_timesteps >= self.due:
            self._plot()
            self.due = self.num_timesteps + self.every
        return True

    def _on_training_end(self) -> None:
        self._plot()

    def _plot(self) -> None:
        new = [float(end["episode"]["r"]) for end in self.ends[self.plotted :]]
        self.plotted = len(self.ends)
        if new:
            self.curve.append((self.num_timesteps, float(np.mean(new))))


if __name__ == "__main__":
    main()

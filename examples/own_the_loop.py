"""Your own PPO loop from Surefoot's parts. Each part is a function of plain arguments, so that any line can be yours.

    python examples/own_the_loop.py                                          # SmolLM2-135M, some two minutes on a CPU
    python examples/own_the_loop.py --model folder/or/hub-id --updates 20    # any causal language model

The model learns to use short words; the reward is minus the mean length of a word, and every update prints it.
"""

from __future__ import annotations

import argparse

import torch

from surefoot import TextTask, advantages, assets, collect, load_policy, update
from surefoot.config import Config, KLConfig, PPOConfig

PROMPTS = ["The weather today is", "My neighbour has", "In the old town", "We talked about", "The film begins when"]


def short_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Minus the mean length of the words, 20 where there are none: plain Python, as any reward."""
    answers = [text.split() for text in completions]
    return [-sum(map(len, words)) / len(words) if words else -20.0 for words in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--episodes", type=int, default=32, help="answers per update; default: %(default)s")
    arguments = parser.parse_args()

    config = Config(ppo=PPOConfig(batch_size=8, n_epochs=2), kl=KLConfig(coef=0.05))
    policy = load_policy(assets.resolve(arguments.model))
    task = TextTask(PROMPTS, short_words, held_out=0.0)
    # One optimiser for all updates, since Adam remembers; and one generator, so that every update shuffles anew.
    optimizer = torch.optim.Adam([p for _, p in policy.named_parameters_to_train()], eps=config.ppo.adam_epsilon)
    shuffle = torch.Generator().manual_seed(0)

    for number in range(arguments.updates):
        first = number * arguments.episodes  # an episode's number decides its prompt and its randomness
        batch = collect(policy, task, episodes=arguments.episodes, first_episode=first, config=config)
        batch = advantages(batch, config)
        learning_rate = 1e-3 * (1 - number / arguments.updates)
        result = update(policy, batch, optimizer=optimizer, config=config, learning_rate=learning_rate, generator=shuffle)

        reward = sum(t.reward for t in batch.trajectories) / len(batch)
        kl = sum(t.kl for t in batch.trajectories) / len(batch)
        print(f"update {number + 1}  reward {reward:.3f}  kl {kl:.2f}  grad norm {result.grad_norm:.2f}", flush=True)
    print(f"{batch.trajectories[0].prompt}{batch.trajectories[0].completion_text}")


if __name__ == "__main__":
    main()

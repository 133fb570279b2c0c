"""A random language model that writes words of one letter: small enough to be trained to the end within seconds."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from surefoot import PPO, TextTask
from surefoot.config import AdapterConfig, CriticConfig, PolicyConfig
from surefoot.policies.lm.policy import CausalLMPolicy, wrap_policy

END = "<eos>"
WORDS = [END, *"abcdefgPQR"]


def word_tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([END])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def word_policy(*, seed: int = 0, width: int = 16, adapter: bool = False, critic: CriticConfig | None = None) -> CausalLMPolicy:
    """One layer. Its completions to one prompt differ in probability, but every word is written now and then."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **tokens, initializer_range=1.2 / width**0.5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = transformers.LlamaForCausalLM(config)
    policy_config = PolicyConfig(adapter=AdapterConfig(rank=4) if adapter else None, critic=critic or CriticConfig())
    return wrap_policy(lm, word_tokenizer(), config=policy_config)


PROMPTS, PLACES = ["a", "b", "c", "d"], 5  # places for a word in a completion


def word_run(reward: Any, folder: Path, *, seed: int = 0, adapter: bool = False, **settings: Any) -> PPO:
    """A small run of completions of several words, evaluated on more prompts."""
    common: dict[str, Any] = {"verbose": 0, "run_folder": str(folder), "run_checkpoint_every": 1_000, "device": "cpu"}
    common |= {"evaluate_every": None, "seed": seed, "max_new_tokens": PLACES, "episodes_per_update": 64, "batch_size": 32}
    common |= {"n_epochs": 2, "learning_rate": 5e-3}
    task = TextTask(PROMPTS, reward, held_out=PROMPTS * 16)
    return PPO(word_policy(seed=seed, width=32, adapter=adapter), task, **(common | settings))


def repeat(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the completion's places with the prompt's word: the policy has to look at the prompt all the way."""
    return [text.split().count(prompt) / PLACES for prompt, text in zip(prompts, completions, strict=True)]

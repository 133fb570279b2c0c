"""A random language model that writes words of one letter: small enough to be trained to the end within seconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from surefoot.config import AdapterConfig, CriticConfig, PolicyConfig
from surefoot.policies.lm.policy import CausalLMPolicy, wrap_policy

END = "<eos>"
WORDS = [END, *"abcdefgPQR"]


def word_tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([END])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def word_policy(
    *,
    seed: int = 0,
    width: int = 16,
    adapter: bool = False,
    critic: CriticConfig | None = None,
) -> CausalLMPolicy:
    """One layer. Its answers to one prompt differ in probability, but every word is written now and then."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=1.2 / width**0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = transformers.LlamaForCausalLM(config)
    policy_config = PolicyConfig(adapter=AdapterConfig(rank=4) if adapter else None, critic=critic or CriticConfig())
    return wrap_policy(lm, word_tokenizer(), config=policy_config)

"""A randomly initialized language model, and a tokenizer made from a user's text."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from surefoot.config import NewModelConfig
from surefoot.errors import InputError
from surefoot.policies.lm.lstm import LstmConfig

END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 4096  # most tokens of a row: neither kind keeps anything of that size
HEAD = 32  # width of a transformer's attention head


def learn_tokenizer(texts: Iterable[str], vocab: int, *, chat: bool = False) -> Any:
    """Byte-level BPE (Sennrich et al. 2015, arXiv:1508.07909) with at most `vocab` tokens, the first the end.

    Every byte is a token: any text comes back from its tokens as it was. With `chat` it has roles and a
    template. Raises InputError where `vocab` has no room for what every tokenizer has.
    """
    special = [END, *(ROLES if chat else ())]
    least = len(special) + 256
    if vocab < least:
        needed = f"256 bytes, an end token and the roles of chats need {least}"
        raise InputError(f"new_model.vocab is {vocab}; {needed}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    settings |= {"vocab_size": vocab, "special_tokens": special, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    written = {"clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE if chat else None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **written)


def random_lm(settings: NewModelConfig, tokenizer: Any, *, seed: int) -> Any:
    """A model of the kind and sizes of `settings`, with transformers' random weights, drawn from `seed`."""
    width = settings.width
    sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": settings.layers}
    common = sizes | {"max_position_embeddings": CONTEXT, "bos_token_id": None}
    common["eos_token_id"] = tokenizer.eos_token_id
    config: Any = LstmConfig(**common)
    if settings.kind == "transformer":
        config = LlamaConfig(**common, intermediate_size=5 * width // 2, num_attention_heads=width // HEAD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def plain_texts(contents: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Every piece of text in examples: texts, prompts and completions, what is said in chats."""
    for content in contents:
        for value in content.values():
            yield from [value] if isinstance(value, str) else (message["content"] for message in value)

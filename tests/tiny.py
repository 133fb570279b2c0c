"""Tiny random models of many families and a small real tokenizer, made in memory: nothing is fetched."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from surefoot.config import AdapterConfig, CriticConfig, PolicyConfig
from surefoot.policies.lm.lstm import LstmConfig, LstmForCausalLM
from surefoot.policies.lm.policy import CausalLMPolicy, wrap_policy
from surefoot.rollout.batch import text_batch
from surefoot.types import Batch
from tests.fakes import trajectory

# Weights are drawn wide, so that distributions are far from uniform and every token of the past matters.
WIDE = 0.5
PAD, END, USER, ASSISTANT = range(4)
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHARACTERS = list("abcdefghijklmnopqrstuvwxyz .,!?'-:0123456789\n")
MERGES = [("t", "h"), ("th", "e"), ("a", "b"), ("i", "n"), ("e", "r"), ("o", "u"), ("a", "n"), ("an", "d")]
VOCABULARY = 61  # four more than the tokenizer has, as padded vocabularies do; no multiple of anything
CONTEXT = 96
SLIDING_WINDOW = 5

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**DECODER, "num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", DECODER),
    "gemma": ("GemmaConfig", {**DECODER, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": SLIDING_WINDOW, "final_logit_softcapping": 5.0}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": SLIDING_WINDOW}),
    "phi": ("PhiConfig", DECODER),
}
_ROUTED = {**_GROUPED, "head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_CONFIGS_OF_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_ROUTED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_ROUTED, "num_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "gpt_oss": ("GptOssConfig", {**_ROUTED, "num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {**_ROUTED, "num_local_experts": 4}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_ROUTED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
}
MIXTURES = tuple(_CONFIGS_OF_MIXTURES)  # of experts
LSTM = "lstm"  # ours; without linear layers for an adapter, so that it is trained whole
FAMILIES = (*_CONFIGS, LSTM)


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config of `family`: two layers of width 32."""
    name, settings = (_CONFIGS | _CONFIGS_OF_MIXTURES).get(family, ("", {"hidden_size": 32}))
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "initializer_range": WIDE}
    common |= {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
    common["tie_word_embeddings"] = family in ("gpt2", "gemma", "gemma2")
    kind = LstmConfig if family == LSTM else getattr(transformers, name)
    return kind(**{**common, **settings, **overrides})


def tiny_lm(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random causal LM of `family`, the same for the same seed; in training mode, as `from_config` leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        if lm.get_output_embeddings().bias is not None:  # transformers starts it at zero, where it would go unnoticed
            torch.nn.init.normal_(lm.get_output_embeddings().bias)
        if family == LSTM:  # by default too narrow to remember much
            for parameter in lm.model.lstm.parameters():
                torch.nn.init.normal_(parameter, std=WIDE)
    return lm


def tiny_tokenizer(*, pad_is_eos: bool = False, chat: bool = False) -> Any:
    """Characters and a few merges, so that decoding and encoding again need not give the same tokens."""
    pieces = [*SPECIAL, *CHARACTERS, *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    named = {"eos_token": "<eos>", "pad_token": "<eos>" if pad_is_eos else "<pad>"}
    template = CHAT_TEMPLATE if chat else None
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def _pieces(space: str, characters: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges with a few whole words behind the character that stands for a space."""
    merges = [(space + word[:n], word[n]) for word in ("the", "film", "was", "good") for n in range(len(word))]
    pieces = dict.fromkeys([*SPECIAL, "<bos>", *characters, *("".join(pair) for pair in merges)])
    return {piece: i for i, piece in enumerate(pieces)}, merges


def _spaced(*, normalizer: Any = None, scheme: str | None = None, strip: bool = False, begin: str = "", end: str = "") -> Any:
    """SentencePiece's way: "▁" is a space, and what has no token is bytes."""
    characters = [f"<0x{n:02X}>" for n in range(256)] + ["▁" if c == " " else c for c in CHARACTERS if c != "\n"]
    vocabulary, merges = _pieces("▁", characters)
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    backend.normalizer = normalizer or normalizers.Sequence([])
    spaces = decoders.Replace("▁", " ")
    if scheme:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        spaces = decoders.Metaspace(prepend_scheme=scheme)
    fused = [spaces, decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(fused + [decoders.Strip(" ", 1, 0)] * strip)
    return _named(backend, begin, end)


def _byte_level(*, prefix_space: bool = False, begin: str = "", end: str = "", holes: int = 0) -> Any:
    vocabulary, merges = _pieces("Ġ", sorted(pre_tokenizers.ByteLevel.alphabet()))
    first = len(vocabulary) - 8  # no token has the ids from here on to the last pieces
    vocabulary = {piece: i + holes * (i >= first) for piece, i in vocabulary.items()}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return _named(backend, begin, end)


def _word_pieces() -> Any:
    characters = [c for c in CHARACTERS if c.strip()]
    vocabulary, _ = _pieces("", [*characters, *(f"##{c}" for c in characters)])
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return _named(backend, "<bos> ", " <eos>")


def _added() -> Any:
    tokenizer = _spaced(normalizer=_LLAMA_2, strip=True, begin="<bos> ")
    tokenizer.add_tokens(["film!", AddedToken("<tool>", lstrip=True, rstrip=True)])
    return tokenizer


def _named(backend: Any, begin: str, end: str) -> Any:
    backend.add_special_tokens([*SPECIAL, "<bos>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin}$A{end}", special_tokens=ids)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **names)


_LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
# By what makes a text's tokens differ from place to place: the space before it, what begins and ends it, bytes.
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "characters": lambda: tiny_tokenizer(chat=True),
    "bytes": _byte_level,
    "bytes, holes": lambda: _byte_level(holes=7),
    "bytes, prefix space": lambda: _byte_level(prefix_space=True),
    "bytes, BOS and EOS": lambda: _byte_level(begin="<bos> ", end=" <eos>"),
    "Llama 2": lambda: _spaced(normalizer=_LLAMA_2, strip=True, begin="<bos> "),
    "Llama 2, EOS": lambda: _spaced(normalizer=_LLAMA_2, strip=True, end=" <eos>"),
    "Llama 2, added tokens": _added,
    "Metaspace": lambda: _spaced(scheme="always"),
    "Metaspace, first": lambda: _spaced(scheme="first", begin="<bos> "),
    "Gemma": lambda: _spaced(normalizer=normalizers.Replace(" ", "▁"), begin="<bos> "),
    "WordPiece": _word_pieces,
}


def tiny_policy(
    family: str = "llama",
    *,
    adapter: bool = True,
    moved: bool = False,
    dtype: torch.dtype = torch.float32,
    stop_gradient: bool = False,
    critic: CriticConfig | None = None,
    tokenizer: Any = None,
    lm: Any = None,
    **overrides: Any,
) -> CausalLMPolicy:
    """A policy over `tiny_lm`; `moved` gives all that is trained a random push. An LSTM is trained whole, adapter or not."""
    lm = tiny_lm(family, **overrides) if lm is None else lm
    adapter = adapter and not isinstance(lm, LstmForCausalLM)
    critic = critic or CriticConfig(stop_gradient=stop_gradient)
    config = PolicyConfig(adapter=AdapterConfig(rank=4) if adapter else None, critic=critic)
    if adapter and dtype == torch.bfloat16:
        lm = lm.to(dtype)  # as `load_policy` stores a frozen base
    policy = wrap_policy(lm, tokenizer or tiny_tokenizer(), config=config, dtype=dtype)
    if moved:
        move(policy)
    return policy


@torch.no_grad()
def move(policy: CausalLMPolicy, *, seed: int = 1) -> None:
    """Push everything that is trained away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters_to_train():
        scale = 0.3 if name.startswith("value_head") else 0.05
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def random_tokens(length: int, *, seed: int) -> tuple[int, ...]:
    """`length` tokens that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist())


def written_batch(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """A batch of (prompt, answer) token pairs, with old log-probs and values 0."""
    return text_batch([trajectory(prompt_tokens=p, tokens=a) for p, a in rows], device=torch.device("cpu"))


def plain_scores(
    policy: CausalLMPolicy, prompt: Sequence[int], answer: Sequence[int], *, lm: Any = None, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probs, values and entropies of `answer` from transformers' own forward pass: one row, no cache, no padding."""
    out = (lm or policy.lm)(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False, output_hidden_states=True)
    before = slice(len(prompt) - 1, -1)  # the position before each written token
    logprobs = torch.log_softmax(out.logits[0, before].float() / temperature, dim=-1)
    return {
        "logprobs": logprobs.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1),
        "values": policy.value_head(out.hidden_states[-1][0, before].float()).squeeze(-1),
        "entropies": -(logprobs.exp() * logprobs).sum(-1),
    }

"""A causal language model as a policy with a critic."""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surefoot.config import PolicyConfig
from surefoot.data.render import decode_more, turn_end
from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, failing_as
from surefoot.policies.lm import adapters
from surefoot.policies.lm import token_logprobs as head
from surefoot.policies.lm.critics import Critic, adapter_critic, context_length, separate_critic
from surefoot.policies.lm.pretrained import check_model_folder, load_pretrained
from surefoot.storage.safetensors import read_tensors
from surefoot.types import Batch, Evaluation, Step

# Written beside the weights by `save`.
CRITIC = "surefoot_critic.safetensors"


class CausalLMPolicy:
    """Policy, critic and reference over one set of weights.

    `lm` is any transformers causal LM, in evaluation mode for good: dropout would make old and new log-probs
    differ before the first step. The reference is the same model with the adapter off, or without an adapter
    a frozen copy. The batch's temperature divides the logits of policy and reference. Without `critic` the
    value head reads the policy's last hidden state.
    """

    reads_whole_rows = True
    notice = ""  # what a user should know of how it is trained, in a line

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        *,
        adapter: Any = None,
        dtype: torch.dtype = torch.float32,
        critic: Critic | None = None,
        stop_gradient: bool = False,
    ):
        self.lm, self.tokenizer = lm.eval(), tokenizer
        self.adapter = adapter  # the PeftModel around `lm`, or None
        self.dtype, self.exact_logprobs = dtype, dtype == torch.float32
        self.critic, self.stop_gradient = critic, stop_gradient
        self._cap = getattr(lm.config, "final_logit_softcapping", None)
        trunk = critic or Critic(lm)
        self.context_length = min(context_length(lm), trunk.context_length)  # prompt and completion together
        # Every end token that the model's generation config, its tokenizer or its chat template names.
        named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
        ids = {*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id}
        end = turn_end(tokenizer)
        if end is not None and end >= len(lm.get_input_embeddings().weight):
            end = None  # the model can neither read nor write it
        self.turn_end = end
        self.model_end_tokens = frozenset(int(i) for i in ids | {end} if i is not None)
        if end not in {None, *ids} and hasattr(lm, "generation_config"):  # who opens what is saved is to know
            lm.generation_config.eos_token_id = sorted(self.model_end_tokens)
        place = {"device": self.device, "dtype": torch.float32}
        self.value_head: nn.Linear = nn.utils.skip_init(nn.Linear, trunk.width, 1, **place)
        # Zero, so that the first values are 0 and the first advantages are the rewards' own.
        zero = {"weight": torch.zeros(1, trunk.width), "bias": torch.zeros(1)}
        self.value_head.load_state_dict(trunk.head or zero)
        self._reference = None if adapter is not None else copy.deepcopy(lm).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.lm.parameters()).device)

    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text that `tokens` add after the tokens `before`, without the names of special ones."""
        return decode_more(self.tokenizer, tokens, before)

    def named_parameters_to_train(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The adapter's parameters, or all of the model's, then the critic's."""
        critics = {} if self.critic is None else self.critic.parameters()
        own = {*critics.values()}
        yield from ((n, p) for n, p in self.lm.named_parameters() if p.requires_grad and p not in own)
        yield from ((f"critic.{name}", p) for name, p in critics.items())
        yield from ((f"value_head.{name}", p) for name, p in self.value_head.named_parameters())

    def new_cache(self, *, slots: int, columns: int) -> Any:
        """An empty cache for `slots` rows of up to `columns` tokens, of the model's kind."""
        if hasattr(self.lm, "new_cache"):
            return self.lm.new_cache(slots=slots, columns=columns)
        # Here: it imports transformers, which environments do without.
        from surefoot.policies.lm.kv_cache import SlotCache

        layers = int(self.lm.config.get_text_config().num_hidden_layers)
        return SlotCache(layers=layers, slots=slots, columns=columns)

    def step(self, tokens_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any) -> Step:
        """Feed tokens after what `cache` holds; float32 logits [B, V] and value [B] at the last of them.

        A separate critic has no cache: its values come afterwards, from `compute_values`, and are 0 here.
        """
        with self._autocast():
            inputs = {"attention_mask": attention_BS, "position_ids": positions_BT, "past_key_values": cache}
            hidden_BTD = self.lm.base_model(input_ids=tokens_BT, use_cache=True, **inputs).last_hidden_state
            last_BD = hidden_BTD[:, -1]
            values_B = last_BD.new_zeros(len(last_BD)) if self.critic is not None else self._values(last_BD)
            return head.logits(last_BD, self.lm.get_output_embeddings(), self._cap), values_B.float()

    def evaluate(self, batch: Batch, *, entropy_gradient: bool = False) -> Evaluation:
        """Log-probs, values and entropies of the completion tokens, from one forward pass over whole rows.

        Values take another pass where the critic is separate, and are 0 of a batch without old ones.
        """
        with self._autocast():
            hidden_ND, logprobs_N, entropies_N = self._logprobs(self.lm, batch, entropy_gradient)
            if not len(batch.values_BT):
                values_N = torch.zeros_like(logprobs_N)
            else:
                values_N = self._values(hidden_ND if self.critic is None else self._critics_hidden(batch))
        return Evaluation(*(_scatter(found, batch.mask_BT) for found in (logprobs_N, values_N, entropies_N)))

    @property
    def compute_values(self) -> Callable[[Batch], Tensor] | None:
        """What gives the values [B, T] of completion tokens that `step` did not; None where it did."""
        return None if self.critic is None else self._critics_values

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probs of the completion tokens under the model as it was before training."""
        reference = self.lm if self._reference is None else self._reference
        with adapters.using(self.adapter), self._autocast():
            return _scatter(self._logprobs(reference, batch)[1], batch.mask_BT)

    def value_at_end(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """What the value head gives at the last of each right-padded row's tokens, [B] float32."""
        with self._autocast():
            hidden_BTD = _hidden(self.lm.base_model, tokens_BT)
            return self._values(hidden_BTD[torch.arange(len(tokens_BT), device=self.device), lengths_B - 1])

    def drop_reference(self) -> None:
        """Free the frozen copy, for a use without KL."""
        self._reference = None

    @torch.no_grad()
    def fingerprint(self) -> int:
        """Checksum of the frozen base, and of the frozen reference where all weights are trained."""
        models, total = [self.lm] if self._reference is None else [self.lm, self._reference], 0
        for parameter in (p for model in models for p in model.parameters() if not p.requires_grad):
            bits = parameter.contiguous().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
            total = (total * 31 + int(bits.sum(dtype=torch.int64))) & (2**63 - 1)
        return total

    def save(self, folder: Path) -> None:
        """Write what `save_model` writes, and the critic beside it."""
        self.save_model(folder)
        critic = {name: p.data.contiguous() for name, p in self._critics_parameters().items()}
        save_file(critic, folder / CRITIC)

    def save_model(self, folder: Path) -> None:
        """Write the tokenizer and plain transformers weights, the policy's adapter merged in."""
        plain = self.lm if self.adapter is None else adapters.merged(self.adapter)
        with silence_transformers():
            plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_extras(self, folder: Path) -> None:
        """The critic that `save` wrote beside the weights. Raises InputError if it does not fit."""
        own, saved = self._critics_parameters(), read_tensors(folder / CRITIC)
        shapes, found = ({name: tensor.shape for name, tensor in each.items()} for each in (own, saved))
        if odd := sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n)):
            where = f"{folder / CRITIC} does not fit this model and its policy.critic"
            raise InputError(f"{where}: {odd[0]} is not the same in both")
        for name, parameter in own.items():
            parameter.data.copy_(saved[name])

    def _logprobs(self, lm: Any, batch: Batch, entropy_gradient: bool = False) -> tuple[Tensor, ...]:
        """Hidden states [N, D] before the completion tokens, and the tokens' log-probs and entropies [N]."""
        hidden_ND = _hidden_before(lm.base_model, batch)
        return hidden_ND, *head.action_logprobs(
            hidden_ND,
            batch.actions_BT[batch.mask_BT],
            head=lm.get_output_embeddings(),
            cap=self._cap,
            temperature=batch.temperature,
            entropy_gradient=entropy_gradient,
        )

    def _autocast(self) -> torch.autocast:
        # One autocast region per forward pass: its cast-weight cache must not outlive an optimizer step.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _critics_parameters(self) -> dict[str, nn.Parameter]:
        trunk = {} if self.critic is None else self.critic.parameters()
        return dict(self.value_head.named_parameters()) | {f"trunk.{name}": p for name, p in trunk.items()}

    def _critics_hidden(self, batch: Batch) -> Tensor:
        assert self.critic is not None
        with adapters.using(self.critic.adapter, adapters.CRITIC):
            return _hidden_before(self.critic.body, batch)

    def _critics_values(self, batch: Batch) -> Tensor:
        with self._autocast():
            return _scatter(self._values(self._critics_hidden(batch)), batch.mask_BT)

    def _values(self, hidden: Tensor) -> Tensor:
        hidden = hidden.detach() if self.stop_gradient else hidden
        with torch.autocast(self.device.type, enabled=False):
            return torch.squeeze(self.value_head(hidden.float()), -1)


def _hidden_before(body: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states [N, D] at the position before each completion token, from which it was drawn."""
    return _hidden(body, batch.observations["tokens"])[:, :-1][batch.mask_BT[:, 1:]]


def _hidden(body: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, D]. No mask: causal attention never looks at padding to the right."""
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    hidden: Tensor = body(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    return hidden


def _scatter(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """[N] back to [B, T], 0 off the mask."""
    return torch.zeros(mask_BT.shape, device=values_N.device).masked_scatter(mask_BT, values_N.float())


def load_policy(
    source: str, config: PolicyConfig | None = None, *, device: str = "cpu", seed: int = 0
) -> CausalLMPolicy:
    """A policy over the causal LM of a local folder or hub id.

    Raises InputError for a folder that is missing, half-written, holds pickle weights, or is not a causal LM,
    and for a model that computes its logits in a way that would be trained wrongly.
    """
    config = config or PolicyConfig()
    check_model_folder(source)
    if config.critic.model is not None:
        check_model_folder(config.critic.model, key="policy.critic.model")
    dtype = resolve_dtype(config.dtype, device)
    lm, tokenizer = load_pretrained(source, dtype=torch.float32 if config.adapter is None else dtype)
    return wrap_policy(lm.to(device), tokenizer, config=config, dtype=dtype, seed=seed)


def wrap_policy(
    lm: Any,
    tokenizer: Any,
    *,
    config: PolicyConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CausalLMPolicy:
    """Put adapter and critic on a transformers model that is already in memory."""
    config, critic, adapter = config or PolicyConfig(), None, None
    _check_tokens(lm, tokenizer)
    if dtype == torch.bfloat16 and lm.device.type == "cpu":
        # The fused kernel rounds differently for every row length: old and new log-probs of the same tokens
        # would differ by several percent. The plain one gives the same bits whatever the padding, as fast.
        lm.set_attn_implementation("eager")
    if config.critic.kind == "separate":
        critic = separate_critic(lm, tokenizer, config.critic, dtype=dtype)
    if config.adapter is None:
        lm.requires_grad_(True)
    else:
        adapter = adapters.add_adapter(lm, config.adapter, seed)
        lm = adapter.get_base_model()
        if config.critic.kind == "adapter":
            critic = adapter_critic(adapter, seed=seed)
    stop = config.critic.stop_gradient
    policy = CausalLMPolicy(lm, tokenizer, adapter=adapter, dtype=dtype, critic=critic, stop_gradient=stop)
    _check_model(policy)
    notices = [] if config.adapter is None else [adapters.left_alone(adapter, config.adapter.targets)]
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", 0)
    if (length := context_length(lm)) < longest:
        why = f"beyond, up to {longest:,}, log-probs depend on the rows that are computed together"
        notices.append(f"policy.model: longrope: prompt and completion have {length:,} tokens at most; {why}")
    policy.notice = "\n".join(filter(None, notices))
    return policy


def _check_tokens(lm: Any, tokenizer: Any) -> None:
    """Raise InputError for an end that the model has no row for; for other such tokens once a text has one.

    Some models have them for good: Gemma 3's small ones have no row for images.
    """
    rows = tokenizer.embedding_rows = len(lm.get_input_embeddings().weight)
    named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    for end in (*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id):
        if end is not None and not (isinstance(end, int) and 0 <= end < rows):
            found = f"eos_token_id is {end!r}, and the model's tokens are 0 to {rows - 1}"
            how = "correct its generation_config.json, config.json or tokenizer"
            raise InputError(f"policy.model: {found}; {how}")


@torch.no_grad()
def _check_model(policy: CausalLMPolicy) -> None:
    """Raise InputError unless what we compute, padded and token by token, is what the model does at once."""
    tokens = torch.arange(4, device=policy.device)
    padded = positions = tokens[[0, 0, 1, 2]]
    attention = torch.tensor([[0, 1, 1, 1, 1]], device=policy.device)
    cache = policy.new_cache(slots=1, columns=5)
    name = type(policy.lm).__name__
    with failing_as(f"policy.model: {name} cannot be decoded token by token here"):
        with policy._autocast():
            expected = policy.lm(input_ids=tokens[None], use_cache=False).logits[0, 2:].float()
        third, _ = policy.step(padded[None], positions[None], attention[:, :4], cache)
        cache.window.end = 4
        fourth, _ = policy.step(tokens[None, 3:], tokens[None, 3:], attention, cache)
    worst = (torch.cat([third, fourth]) - expected).abs().max() / expected.abs().max()
    if not worst < (1e-3 if policy.dtype == torch.float32 else 0.1):
        how = "it changes them after the output layer, keeps more than keys and values, or looks ahead"
        found = f"{name} computes its logits in a way Surefoot does not know (off by {float(worst):.1%})"
        raise InputError(f"policy.model: {found}: {how}; training it would be wrong")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The arithmetic `policy.dtype` means on this device; `auto` is bfloat16 only where hardware has it."""
    is_fast = name == "bfloat16"
    if name == "auto" and device == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif name == "auto" and device == "cpu":
        is_fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32

"""Critics with separate weights: an adapter on the policy's frozen base, or a whole transformer.

Their values cost one more forward pass: they come after the rollout, over whole rows (`rollout/logprobs.py`).
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.config import CriticConfig
from surefoot.core.seeds import derived_seed
from surefoot.data.silence import silence_transformers
from surefoot.errors import InputError, failing_as
from surefoot.policies.lm import adapters
from surefoot.policies.lm.pretrained import REWARD, load_pretrained
from surefoot.storage.safetensors import read_tensors


class Critic:
    """The trunk whose last hidden state the value head reads: `body`, `lm` without its output layer.

    With `adapter` (peft's model) it is the policy's, and the critic is the adapter of that name. `head` is
    what the value head starts from, weight [1, D] and bias [1]; without one it starts at 0.
    """

    def __init__(self, lm: Any, *, adapter: Any = None, head: dict[str, Tensor] | None = None):
        self.body, self.adapter, self.head = lm.base_model, adapter, head
        self.width, self.context_length = lm.get_output_embeddings().weight.shape[1], context_length(lm)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; float32."""
        named = self.body.named_parameters()
        return {name: p for name, p in named if self.adapter is None or f".{adapters.CRITIC}." in f"{name}."}


def adapter_critic(adapter: Any, *, seed: int) -> Critic:
    """A second adapter over the base of peft's model `adapter`: of the policy's shape, at first 0 too.

    Raises InputError where it would reach nothing that the critic reads.
    """
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.manual_seed(derived_seed(seed, "critic", 0))
        adapter.add_adapter(adapters.CRITIC, copy.deepcopy(adapter.peft_config[adapters.POLICY]))
    critic = Critic(adapter.get_base_model(), adapter=adapter)
    for parameter in critic.parameters().values():
        parameter.requires_grad_(True)
    if not critic.parameters():
        why = "it would have no adapter: the targets are on the output layer alone, which it does not read"
        raise InputError(f"policy.critic.kind: {why}; use shared or separate")
    return critic


def separate_critic(lm: Any, tokenizer: Any, config: CriticConfig, *, dtype: torch.dtype) -> Critic:
    """A copy of `lm`, or the model that `config` names; all of it is trained, in float32.

    A reward model's folder gives the head too: its calibrated reward is where the values start, as in
    Stiennon et al. 2020, arXiv:2009.01325. Raises InputError for a model that cannot be this policy's critic.
    """
    head, source = None, lm
    if config.model is not None:
        if (reward := Path(config.model) / REWARD).is_file():
            head = _calibrated_head(reward)
        source, other = load_pretrained(config.model, dtype=torch.float32, key="policy.critic.model")
        _check_vocabulary(config.model, tokenizer, other, source, lm)
        source = source.to(lm.device)
        if dtype == torch.bfloat16 and lm.device.type == "cpu":
            source.set_attn_implementation("eager")  # as the policy's: see `wrap_policy`
        _check_causal(config.model, source.base_model)
    critic = Critic(source, head=head)
    if head is not None and head["weight"].shape != (1, critic.width):
        found = f"the head in {REWARD} is {list(head['weight'].shape)}, and the model wants"
        raise InputError(f"policy.critic.model {config.model}: {found} [1, {critic.width}]")
    body = copy.deepcopy(critic.body) if source is lm else critic.body
    critic.body = body.float().eval().requires_grad_(True)
    return critic


def context_length(lm: Any) -> int:
    """Most tokens that a transformers model reads, and computes the same alone and in any batch.

    Under longrope it is the original length: beyond it the longest row of a batch decides where all stand.
    """
    config = lm.config.get_text_config()
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # MPT's
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            named.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in named if limit is not None), default=1 << 30)


def _calibrated_head(file: Path) -> dict[str, Tensor]:
    """A reward model's head with its calibration folded in: w·h + b becomes (w·h + b - shift) / scale."""
    tensors = read_tensors(file)
    if tensors.keys() != {"weight", "bias", "shift", "scale"}:
        found = sorted(tensors)
        raise InputError(f"policy.critic.model: {file} has no head with its calibration; it has {found}")
    scale = tensors["scale"]
    return {
        "weight": (tensors["weight"].double() / scale).float(),
        "bias": ((tensors["bias"].double() - tensors["shift"]) / scale).float(),
    }


def _check_vocabulary(name: str, tokenizer: Any, other: Any, critic: Any, lm: Any) -> None:
    own, its = tokenizer.get_vocab(), other.get_vocab()
    if own != its:
        odd = next(token for token in sorted(own.keys() | its.keys()) if own.get(token) != its.get(token))
        found = f"its tokenizer is not the policy's ({odd!r} is {its.get(odd)} in one and {own.get(odd)} in"
        how = "a critic reads the tokens that the policy writes"
        raise InputError(f"policy.critic.model {name}: {found} the other); {how}")
    rows, needed = (len(model.get_input_embeddings().weight) for model in (critic, lm))
    if rows < needed:
        found = f"it has embeddings for {rows} tokens; the policy may write {needed}"
        raise InputError(f"policy.critic.model {name}: {found}")


@torch.no_grad()
def _check_causal(name: str, body: Any) -> None:
    """Raise InputError for a model that looks ahead: its values would know what is still to be written."""
    tokens = torch.arange(4, device=next(body.parameters()).device)[None]
    with failing_as(f"policy.critic.model {name}: it gives no hidden states here"):
        longer, shorter = (body(input_ids=tokens[:, :n], use_cache=False).last_hidden_state for n in (4, 3))
    if (longer[:, :3] - shorter).abs().max() > 1e-3 * shorter.abs().max():
        reason = "it looks ahead, and a value must not know what comes after it"
        raise InputError(f"policy.critic.model {name}: {reason}")

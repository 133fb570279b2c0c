"""A language model's continuation of prompts: what `PPO.generate` and `SFT.generate` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surefoot.config import Config, with_sampling
from surefoot.core.seeds import derived_seed
from surefoot.data.render import check_length, encode_prompt
from surefoot.data.rows import checked_prompt
from surefoot.errors import InputError
from surefoot.generation.engine import generate
from surefoot.policies.lm.policy import CausalLMPolicy
from surefoot.rollout.text import completion_text, text_engine
from surefoot.types import Request, SamplingParams


def generate_text(
    policy: CausalLMPolicy,
    prompts: Any,
    *,
    config: Config,
    chat: bool = False,
    seed: int = 0,
    **sampling: Any,
) -> str | list[str]:
    """Continue a prompt (gives a string) or a list of prompts, strings or messages (gives a list)."""
    settings = with_sampling(config.generation, sampling)
    params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    if not isinstance(prompts, (str, Sequence)):
        raise InputError(f"prompts: expected a string or a list of prompts, got {type(prompts).__name__}")
    is_one = isinstance(prompts, str)
    engine = text_engine(policy, settings)
    requests = []
    for number, prompt in enumerate([prompts] if is_one else prompts):
        checked = checked_prompt(prompt, "generate" if is_one else f"generate, prompt {number + 1}")
        tokens = encode_prompt(policy.tokenizer, checked, chat=chat)
        check_length(tokens, str(checked), context=policy.context_length, new_tokens=params.max_new_tokens)
        stop = tuple(settings.stop)
        requests.append(Request(tokens, derived_seed(seed, "generate", number), params, stop))
    texts = [completion_text(policy, completion) for completion in generate(engine, requests)]
    return texts[0] if is_one else texts

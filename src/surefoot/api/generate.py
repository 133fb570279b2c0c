"""A language model's continuation of prompts: `generate` of `PPO` and of `SFT`."""

from collections.abc import Sequence
from typing import Any, Protocol, overload

from surefoot.config import Config, with_sampling
from surefoot.core.seeds import derived_seed
from surefoot.data.render import check_length, encode_prompt
from surefoot.data.rows import checked_prompt
from surefoot.errors import InputError
from surefoot.generation.engine import generate
from surefoot.rollout.text import completion_text, text_engine
from surefoot.types import Request, SamplingParams


class Generates(Protocol):
    """A model that continues text."""

    config: Config
    policy: Any

    @overload
    def generate(self, prompts: str, *, seed: int = 0, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Any], *, seed: int = 0, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: Any, *, seed: int = 0, **sampling: Any) -> str | list[str]:
        """Continue a prompt, or each of several, with these `sampling` fields of `generation` changed."""
        if self.config.env is not None:
            raise InputError("generate is for language models; a policy for an environment has predict")
        settings, policy = with_sampling(self.config.generation, sampling), self.policy
        params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
        if not isinstance(prompts, (str, Sequence)):
            raise InputError(f"prompts: expected a string or a list of prompts, got {type(prompts).__name__}")
        limits = {"context": policy.context_length, "new_tokens": params.max_new_tokens}
        is_one = isinstance(prompts, str)
        engine, requests = text_engine(policy, settings), []
        for number, prompt in enumerate([prompts] if is_one else prompts):
            checked = checked_prompt(prompt, "generate" if is_one else f"generate, prompt {number + 1}")
            tokens = encode_prompt(policy.tokenizer, checked, chat=settings.chat)
            check_length(tokens, str(checked), **limits)
            its_seed = derived_seed(seed, "generate", number)
            requests.append(Request(tokens, its_seed, params, tuple(settings.stop)))
        pairs = zip(requests, generate(engine, requests), strict=True)
        texts = [completion_text(policy, *pair) for pair in pairs]
        return texts[0] if is_one else texts

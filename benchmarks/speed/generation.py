"""Tokens per second: Surefoot's engine beside transformers' `generate`, on the same model, prompts and lengths.

Both sides in one process, interleaved, after one warm-up each; medians and the ratio of each pair. Both sample the full
distribution at temperature 1 and give log-probs of what they sampled, which PPO needs. Run:

    python benchmarks/speed/generation.py [--rows 64] [--new-tokens 24] [--dtype float32] [--spread]

`--spread` lets completions end at random lengths (a synthetic end-of-text rule), where continuous batching matters.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from surefoot import assets
from surefoot.config import PolicyConfig
from surefoot.generation.engine import TokenEngine, generate
from surefoot.policies.lm.policy import CausalLMPolicy, load_policy
from surefoot.types import Request, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spread", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    policy = load_policy(assets.resolve(options.model), PolicyConfig(dtype=options.dtype))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (options.rows, options.prompt_tokens), generator=generator)
    limits = (
        [1 + i * options.new_tokens // options.rows for i in range(options.rows)] if options.spread else None
    )

    ours = lambda: run_engine(policy, prompts, options.new_tokens, limits)
    theirs = lambda: run_transformers(policy, prompts, options.new_tokens, limits)
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds)]
    tokens = sum(limits) if limits else options.rows * options.new_tokens
    bound = decode_bound(policy, options)
    shape = "x".join(map(str, (options.rows, options.new_tokens)))
    print(
        f"{options.model} {options.dtype}, {shape} new tokens after {options.prompt_tokens}, {torch.get_num_threads()} threads"
    )
    for name, times in (
        ("surefoot", [p[0] for p in pairs]),
        ("transformers generate", [p[1] for p in pairs]),
    ):
        median = statistics.median(times)
        print(
            f"  {name:22} {tokens / median:7.0f} tokens/s   {median:6.2f} s (min {min(times):.2f}, max {max(times):.2f})"
        )
    ratios = [theirs / ours for ours, theirs in pairs]
    print(
        f"  ratio, pair by pair     {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
    )
    if not options.spread:
        print(
            f"  arithmetic bound        {tokens / bound:7.0f} tokens/s: surefoot is at {bound / statistics.median([p[0] for p in pairs]):.0%} of it"
        )


def run_engine(
    policy: CausalLMPolicy, prompts: torch.Tensor, new_tokens: int, limits: list[int] | None
) -> None:
    requests = [
        Request(
            tuple(row.tolist()),
            seed=i,
            params=SamplingParams(max_new_tokens=limits[i] if limits else new_tokens),
        )
        for i, row in enumerate(prompts)
    ]
    generate(TokenEngine(policy, slots=len(requests), end_tokens=frozenset()), requests)


def run_transformers(
    policy: CausalLMPolicy, prompts: torch.Tensor, new_tokens: int, limits: list[int] | None
) -> None:
    """The same from `generate`: it has no per-row limit, so every row runs to the longest, as in a static batch."""
    with torch.no_grad(), policy._autocast():
        policy.lm.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def decode_bound(policy: CausalLMPolicy, options: argparse.Namespace) -> float:
    """Seconds that the matrix products alone would take at the rate this machine reaches on one large product."""
    dtype = policy.dtype
    a, b = torch.randn(options.rows, 1536, dtype=dtype), torch.randn(1536, 4096, dtype=dtype)
    torch.mm(a, b)
    best = min(seconds(lambda: [torch.mm(a, b) for _ in range(50)]) / 50 for _ in range(5))  # type: ignore[arg-type,return-value]
    rate = 2 * options.rows * 1536 * 4096 / best
    weights = sum(p.numel() for name, p in policy.lm.named_parameters())
    return 2 * weights * options.rows * (options.new_tokens + options.prompt_tokens) / rate


if __name__ == "__main__":
    main()

"""Seconds that stop strings cost: the same completions with 0, 1 and 4 strings that none of them has. Run:

    python benchmarks/speed/stop_strings.py [--rows 16] [--new-tokens 1000] [--rounds 5]

A tiny random model over bytes, so that little else takes time; interleaved in one process after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from surefoot import new_model
from surefoot.config import PolicyConfig
from surefoot.generation.engine import TokenEngine, generate
from surefoot.policies.lm.policy import CausalLMPolicy, load_policy
from surefoot.types import Request, SamplingParams

STOPS = ("~~stop~~", "</answer>", "\n\n\n\n\n", "Question:")
TEXTS = [f"{n} and {n + 1} are numbers, and so is {2 * n}." for n in range(50)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = new_model(Path(folder) / "model", TEXTS, vocab=300, width=32, layers=1)
        policy = load_policy(str(source), PolicyConfig(adapter=None, dtype="float32"))
    counts = (0, 1, 4)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    run(policy, STOPS, options)
    for _ in range(options.rounds):
        for count in counts:
            seconds[count].append(run(policy, STOPS[:count], options))
    for count, times in seconds.items():
        median = f"{statistics.median(times):6.2f} s (min {min(times):.2f}, max {max(times):.2f})"
        print(f"{options.rows} x {options.new_tokens} tokens, {count} stop strings: {median}")


def run(policy: CausalLMPolicy, stop: tuple[str, ...], options: argparse.Namespace) -> float:
    prompt, params = tuple(policy.tokenizer("7 and")["input_ids"]), SamplingParams(options.new_tokens)
    requests = [Request(prompt, row, params, stop) for row in range(options.rows)]
    engine = TokenEngine(policy, slots=options.rows, end_tokens=frozenset())
    started = time.perf_counter()
    generate(engine, requests)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

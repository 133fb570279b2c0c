"""`examples/own_the_loop.py` runs as a user would run it, and what it prints comes from training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.tiny import tiny_lm, tiny_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_the_loop.py"


def test_two_updates_on_a_model_folder(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        tiny_lm("llama").save_pretrained(tmp_path)
    # It knows no capital letters and drops those of the example's prompts.
    tiny_tokenizer().save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--model", str(tmp_path), "--updates", "2", "--episodes", "16"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = [re.fullmatch(r"update (\d)  reward (\S+)  kl (\S+)  grad norm (\S+)", line) for line in result.stdout.splitlines()]
    first, second = (line for line in lines if line is not None)
    assert (first[1], second[1]) == ("1", "2")
    assert all(-24 <= float(line[2]) <= -1 and float(line[4]) > 0 for line in (first, second))
    # Policy and reference are one before the first step (to bfloat16, where that is the arithmetic), not after it.
    assert abs(float(first[3])) < 0.05 < abs(float(second[3]))


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60

"""The demo: a real model, a real reward, a table of what changed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from surefoot.api import runs
from surefoot.api.ppo import PPO
from surefoot.config import load_config
from surefoot.storage.run_folder import RunFolder

# Row of the table -> metric and format.
ROWS = {
    "reward, mean (held-out)": ("eval/reward", "{:+.3f}"),
    "sequence KL, mean (nats)": ("eval/kl", "{:.2f}"),
    "distinct-2": ("eval/distinct_2", "{:.3f}"),
    "length, mean (tokens)": ("eval/length", "{:.1f}"),
}


def run_demo(overrides: dict[str, str]) -> None:
    """Train as `demo.yaml` says, changed by `overrides`, and show before and after."""
    console = Console()
    config = load_config(Path(__file__).with_name("demo.yaml"), overrides)
    if config.run.name is None:
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"name": RunFolder.free_name(config, "demo")})}
        )
    model = runs.start(config)
    assert isinstance(model, PPO)
    console.print(
        f"PPO fine-tunes {config.policy.model} to continue movie-review openings cheerfully: "
        f"{config.rollout.total_episodes} episodes, reward: VADER's sentiment of the continuation, on "
        f"{model.policy.device.type} in {str(model.policy.dtype).removeprefix('torch.')}.",
        highlight=False,
    )
    started = time.monotonic()
    runs.finish(model)
    minutes = (time.monotonic() - started) / 60
    assert model.run_folder is not None
    show_change(RunFolder.open(model.run_folder), console, minutes)


def show_change(run: RunFolder, console: Console, minutes: float) -> None:
    """Print the table of held-out metrics, five prompts with both completions, and where to go next."""
    evaluations = [row for row in run.read("metrics.jsonl") if "eval/reward" in row]
    if not evaluations:  # task.held_out 0 leaves nothing to compare
        console.print(f"run    {run.path}", highlight=False, soft_wrap=True)
        return
    before, after = evaluations[0], evaluations[-1]
    table = Table(
        title=f"Before and after {after['update']} updates, {minutes:.1f} minutes", title_justify="left"
    )
    for heading in ("", "base", "tuned", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, (name, form) in ROWS.items():
        difference = form.replace(":.", ":+.").format(after[name] - before[name])
        table.add_row(label, form.format(before[name]), form.format(after[name]), difference)
    console.print(table)
    console.print(_completions(run, before["update"], after["update"]))
    path = run.path
    console.print(
        f"model  {path / 'model'}   (AutoModelForCausalLM.from_pretrained opens it)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"run    {path}   (config, metrics, samples, checkpoints)\n\nNext:", highlight=False, soft_wrap=True
    )
    here = _programs_folder()
    for command in (
        f'{here}surefoot generate {path} "The film"',
        f"{here}tensorboard --logdir {path.parent}",
        f"{here}surefoot demo --kl.coef 0.2 --seed 1",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)


def _programs_folder() -> str:
    """What to type before `surefoot`: nothing where the shell finds it, else the folder this program was
    started from.
    """
    if shutil.which("surefoot"):
        return ""
    folder = Path(sys.argv[0]).parent
    return f"{os.path.relpath(folder)}/" if (folder / "surefoot").exists() else ""


def _completions(run: RunFolder, before: int, after: int) -> Table:
    samples = [row for row in run.read("samples.jsonl") if row["split"] == "held_out"]
    table = Table(title="The same held-out prompts and seeds", title_justify="left", show_lines=True)
    for heading in ("prompt", "base", "tuned"):
        table.add_column(heading)
    pairs = zip(
        [s for s in samples if s["update"] == before],
        [s for s in samples if s["update"] == after],
        strict=True,
    )
    for base, tuned in list(pairs)[:5]:
        table.add_row(
            _plain(base["prompt"]),
            *(f"{_plain(s['completion'])} [{s['reward']['reward']:+.2f}]" for s in (base, tuned)),
        )
    return table


def _plain(text: Any) -> str:
    """On one line, and with nothing in it that rich would take for markup."""
    return escape(" ".join(str(text).split()))

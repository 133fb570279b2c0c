"""The demo: a real model, a real reward, a table of what changed."""

import os
import shutil
import sys
import time
from functools import partial
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
    name = config.run.name or RunFolder.free_name(config, "demo")
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    model = runs.start(config)
    assert isinstance(model, PPO)
    dtype = str(model.policy.dtype).removeprefix("torch.")
    console.print(
        f"PPO fine-tunes {config.policy.model} to continue movie-review openings cheerfully: "
        f"{config.rollout.total_episodes} episodes, reward: VADER's sentiment of the continuation, on "
        f"{model.policy.device.type} in {dtype}.",
        highlight=False,
    )
    started = time.monotonic()
    run = RunFolder.open(runs.finish(model).parent)
    minutes = (time.monotonic() - started) / 60
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    evaluations = [row for row in run.read("metrics.jsonl") if "eval/reward" in row]
    if not evaluations:  # task.held_out 0 leaves nothing to compare
        say(f"run    {run.path}")
        return
    before, after = evaluations[0], evaluations[-1]
    title = f"Before and after {after['update']} updates, {minutes:.1f} minutes"
    table = Table("", title=title, title_justify="left")
    for heading in ("base", "tuned", "change"):
        table.add_column(heading, justify="right")
    for label, (name, form) in ROWS.items():
        difference = form.replace(":.", ":+.").format(after[name] - before[name])
        table.add_row(label, form.format(before[name]), form.format(after[name]), difference)
    console.print(table)
    samples = [row for row in run.read("samples.jsonl") if row["split"] == "held_out"]
    title = "The same held-out prompts and seeds"
    table = Table("prompt", "base", "tuned", title=title, title_justify="left", show_lines=True)
    parts = [[row for row in samples if row["update"] == end["update"]] for end in (before, after)]
    for pair in list(zip(*parts, strict=True))[:5]:
        texts = (f"{_plain(row['completion'])} [{row['reward']['reward']:+.2f}]" for row in pair)
        table.add_row(_plain(pair[0]["prompt"]), *texts)
    console.print(table)
    path, here, program = run.path, "", Path(sys.argv[0]).parent / "surefoot"
    if not shutil.which("surefoot") and program.exists():  # what to type where the shell does not find it
        here = f"{os.path.relpath(program.parent)}/"
    say(f"model  {path / 'model'}   (AutoModelForCausalLM.from_pretrained opens it)")
    say(f"run    {path}   (config, metrics, samples, checkpoints)\n\nNext:")
    say(f'  {here}surefoot generate {path} "The film"')
    say(f"  {here}tensorboard --logdir {path.parent}")
    say(f"  {here}surefoot demo --kl.coef 0.2 --seed 1")


def _plain(text: Any) -> str:
    """On one line, and with nothing in it that rich would take for markup."""
    return escape(" ".join(str(text).split()))

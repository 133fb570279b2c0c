"""What a run shows while it lasts: in a terminal a live table with a bar, elsewhere one line an update."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from surefoot.train import loop

# Metric -> its label and form in the table, and how it stands where each update is one line.
SHOWN = {
    "reward/mean": ("reward", "{:+.3f}", "reward {:+.3f}"),
    "ptx/loss": ("demonstrations", "{:.3f} nats/token", "demonstrations {:.3f}"),
    "sft/nll": ("NLL", "{:.3f} nats/token", "NLL {:.3f}"),
    "sft/epoch": ("epoch", "{:.2f}", "epoch {:.2f}"),
    "reward_model/loss": ("loss", "{:.3f}", "loss {:.3f}"),
    "reward_model/epoch": ("epoch", "{:.2f}", "epoch {:.2f}"),
    "dpo/loss": ("loss", "{:.3f}", "loss {:.3f}"),
    "dpo/epoch": ("epoch", "{:.2f}", "epoch {:.2f}"),
    "rewards/margins": ("margin", "{:+.3f}", "margin {:+.3f}"),
    "rollout/ep_rew_mean": ("return", "{:.2f}", "return {:.2f}"),
    "rollout/ep_len_mean": ("episode length", "{:.1f} steps", "length {:.1f}"),
    "kl/reference": ("KL to reference", "{:.2f} nats", "KL {:.2f}"),
    "policy/entropy": ("entropy", "{:.2f} nats", "entropy {:.2f}"),
    "ppo/clip_fraction": ("clipped", "{:.1%}", "clipped {:.1%}"),
    "critic/explained_variance": ("critic explains", "{:.0%}", ""),
    "length/mean": ("length", "{:.1f} tokens", ""),
    "throughput/tokens_per_s": ("speed", "{:.0f} tokens/s", "{:.0f} tokens/s"),
    "throughput/steps_per_s": ("speed", "{:.0f} steps/s", "{:.0f} steps/s"),
}
# Metric of an evaluation -> the same.
EVALUATED = {
    "eval/reward": "reward {:+.3f}",
    "eval/reward_std": "± {:.3f}",
    "eval/nll": "NLL {:.3f} nats/token",
    "eval/perplexity": "perplexity {:.2f}",
    "eval/ptx_perplexity": "demonstrations' perplexity {:.2f}",
    "eval/accuracy": "accuracy {:.3f}",
    "eval/margin": "margin {:+.3f}",
    "eval/pearson": "Pearson {:.3f}",
    "eval/spearman": "Spearman {:.3f}",
    "eval/metric": "metric {:+.3f}",
    "eval/kl": "KL {:.2f} nats",
    "eval/distinct_2": "distinct-2 {:.2f}",
    "eval/length": "length {:.1f}",
}
LINE_SECONDS = 1.0  # an update of control takes milliseconds; nobody reads a line for each


class Display:
    """An observer of the loop. Use as a context manager around it."""

    def __init__(self, total_updates: int, *, console: Console | None = None):
        self.console = console or Console()
        self.total_updates = total_updates
        self._metrics: dict[str, float] = {}
        self._evaluation = ""
        self._said_at = 0.0
        texts = [TextColumn("{task.description}"), TextColumn("{task.fields[eta]}")]
        self._bar = Progress(texts[0], BarColumn(bar_width=None), texts[1])
        self._task = self._bar.add_task("starting", total=total_updates, eta="")
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
        self._started: tuple[int, float] | None = None  # updates and time when this session began

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def phase(self, name: str) -> None:
        """Show what the run is at."""
        self._bar.update(self._task, description=name)

    def log(self, metrics: dict[str, float], progress: loop.Progress, samples: Sequence[Any]) -> None:
        """Show an update's or an evaluation's metrics."""
        if "eval/metric" in metrics:
            self._evaluation = f"held-out after {progress.updates} updates: {_shown(metrics, EVALUATED)}"
            self._say(self._evaluation)
            return
        self._metrics = metrics
        is_last, now = progress.updates == self.total_updates, time.monotonic()
        if now - self._said_at < LINE_SECONDS and not is_last:
            return
        self._said_at = now
        eta, done = self._eta(progress.updates), f"{progress.updates}/{self.total_updates}"
        self._bar.update(self._task, completed=progress.updates, eta=f"{done} · ETA {eta}")
        shown = _shown(metrics, {name: form for name, (*_, form) in SHOWN.items() if form})
        self._say(f"update {done}  {shown}  {_time_shares(metrics)}  ETA {eta}")
        if skipped := _skipped(metrics):
            self._say(f"  {skipped:.0f} optimizer steps skipped so far (non-finite loss or gradient)")

    def _say(self, line: str) -> None:
        if not self._live.is_started:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _eta(self, updates: int) -> str:
        now = time.monotonic()
        if self._started is None:
            self._started = (updates - 1, now - sum(_seconds(self._metrics).values()))
        first, since = self._started
        seconds = (now - since) / max(updates - first, 1) * (self.total_updates - updates)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, (label, form, _) in SHOWN.items():
            if name in self._metrics:
                table.add_row(f"  {label}", form.format(self._metrics[name]))
        if self._metrics:
            table.add_row("  time", _time_shares(self._metrics))
            table.add_row("  skipped steps", f"{_skipped(self._metrics):.0f}")
        return Group(*filter(None, [self._evaluation]), table, self._bar)


def _skipped(metrics: dict[str, float]) -> float:
    return next((value for name, value in metrics.items() if name.endswith("/skipped_steps")), 0.0)


def _seconds(metrics: dict[str, float]) -> dict[str, float]:
    return {part: metrics.get(f"time/{part}_s", 0.0) for part in ("rollout", "score", "update")}


def _time_shares(metrics: dict[str, float]) -> str:
    parts = _seconds(metrics)
    whole = sum(parts.values()) or 1.0
    return " · ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())


def _shown(metrics: dict[str, float], forms: dict[str, str]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in forms.items() if name in metrics)

"""Both sides of the learning comparison from a folder of JSON files: a Markdown table, and a PNG of the curves of each task.

    python benchmarks/learn/compare.py RESULTS [RESULTS ...] --output docs/learning

RESULTS are files, or folders of them, that `ours.py` and `peer_sb3.py` have written. A seed is one sample: what is compared is
each seed's mean return over its final evaluation episodes, with greedy actions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

OURS, THEIRS = "surefoot", "stable-baselines3"
NAMES = {OURS: "Surefoot", THEIRS: "Stable-Baselines3"}
COLOURS = {OURS: "tab:blue", THEIRS: "tab:orange"}
DRAWS = 10_000  # of the bootstrap
# rl-baselines3-zoo's benchmark.md (PPO, ppo_lstm): one run each, 150k evaluation steps; with how many training steps.
PUBLISHED = {
    "CartPole-v1": "500 ± 0 (100k)",
    "Acrobot-v1": "-73.5 ± 18 (1M)",
    "MountainCarContinuous-v0": "88.3 ± 2.6 (20k)",
    "Pendulum-v1": "-172 ± 104 (100k)",
    "LunarLander-v3": "242 ± 32 (v2, 1M)",
    "Pong": "20.99 ± 0.1 (10M)",
}
HEAD = """# Learning beside Stable-Baselines3

Written by `benchmarks/learn/compare.py` from what `ours.py` and `peer_sb3.py` wrote, one file a task and seed. Same settings
(`tasks.json`, with their sources), same seeds, same number of steps. A seed is one sample: its mean return over 100 (highway and
Pong: 20) fresh episodes with greedy actions. Mean ± standard deviation over seeds; the difference with the percentile
bootstrap's interval over seeds, which is narrow for so few of them (with 3, it holds the truth in about 8 of 10 cases).
MountainCarContinuous and Acrobot got five more seeds on both sides after a look at the first three."""
Results = dict[str, dict[str, list[dict[str, Any]]]]  # task -> library -> runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder for learning.md and the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = load(options.results)
    pictures = [f"![{task}](curve_{task}.png)" for task in results]
    pages = [HEAD, table(results), rates(results), "## Learning curves", *pictures]
    text = "\n\n".join(page for page in pages if page) + "\n"
    (options.output / "learning.md").write_text(text)
    print(text)
    for task, libraries in results.items():
        draw(options.output / f"curve_{task}.png", task, libraries)


def load(places: list[Path]) -> Results:
    """Task -> library -> runs in the order of their seeds; tasks in the order of tasks.json, others after them."""
    order = list(json.loads(Path(__file__).with_name("tasks.json").read_text()))
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    files = [
        file for place in places for file in (sorted(place.glob("*.json")) if place.is_dir() else [place])
    ]
    for file in files:
        run = json.loads(file.read_text())
        if isinstance(run, dict) and {"library", "task", "seed", "curve", "final"} <= run.keys():
            found[run["task"]][run["library"].split()[0]][run["seed"]] = run
    tasks = sorted(found, key=lambda task: order.index(task) if task in order else len(order))
    return {
        task: {library: [seeds[n] for n in sorted(seeds)] for library, seeds in found[task].items()}
        for task in tasks
    }


def table(results: Results) -> str:
    """The comparison, a row a task."""
    head = (
        "| task | steps | seeds | Surefoot | SB3 | difference (95 %) | rl-zoo's own figure (steps) |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )
    return "\n".join([head, *(row(task, libraries) for task, libraries in results.items())])


def row(task: str, libraries: dict[str, list[dict[str, Any]]]) -> str:
    ours, theirs = (libraries.get(library, []) for library in (OURS, THEIRS))
    seeds = f"{len(ours)} : {len(theirs)}" if len(ours) != len(theirs) else str(len(ours))
    steps = f"{max(run['timesteps'] for run in ours + theirs):,}".replace(",", " ")
    cells = [
        task,
        steps,
        seeds,
        spread(finals(ours)),
        spread(finals(theirs)),
        difference(finals(ours), finals(theirs)),
    ]
    cells.append(PUBLISHED.get(task, "none"))
    return f"| {' | '.join(cells)} |"


def rates(results: Results) -> str:
    """Crashes and successes in the final episodes, where an environment tells of them; empty if none does."""
    lines = []
    for task, libraries in results.items():
        for rate, called in (("crash_rate", "crashed"), ("success_rate", "succeeded")):
            values = [
                [100 * run["final"][rate] for run in libraries.get(library, []) if rate in run["final"]]
                for library in (OURS, THEIRS)
            ]
            if any(values):
                lines.append(
                    f"| {task} | {called} | {spread(values[0])} | {spread(values[1])} | {difference(*values)} |"
                )
    if not lines:
        return ""
    return "\n".join(
        ["| task | episodes, % | Surefoot | SB3 | difference (95 %) |\n|---|---|--:|--:|--:|", *lines]
    )


def finals(runs: list[dict[str, Any]]) -> list[float]:
    return [run["final"]["mean"] for run in runs]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "not run"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Difference of the means with the bootstrap's 95 % interval: seeds drawn again, with replacement, on each side."""
    if not ours or not theirs:
        return "not run"
    middle = np.mean(ours) - np.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return f"{middle:+.1f} (one seed)"
    random = np.random.default_rng(0)
    means = [random.choice(side, size=(DRAWS, len(side))).mean(1) for side in (ours, theirs)]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def draw(path: Path, task: str, libraries: dict[str, list[dict[str, Any]]]) -> None:
    """Write the learning curves of a task: a library's mean over seeds as a line, lowest to highest seed as a band."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for library in (THEIRS, OURS):
        runs = [run for run in libraries.get(library, []) if run["curve"]]
        if not runs:
            continue
        grid, values = on_one_grid([np.array(run["curve"], dtype=float) for run in runs])
        many = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes.plot(
            grid, values.mean(0), color=COLOURS[library], label=f"{NAMES[library]}, mean and range of {many}"
        )
        axes.fill_between(grid, values.min(0), values.max(0), color=COLOURS[library], alpha=0.2, linewidth=0)
    axes.set_title(task, fontsize=14)
    axes.set_xlabel("timesteps")
    axes.set_ylabel("return of training episodes")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", " "))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def on_one_grid(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [P] that all curves cover, and the curves' values there [seeds, P], each a mean over 5 % of the run: one side
    has a point for every update, the other for every hundredth of the run.
    """
    start, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.linspace(start, max(start, end), 200)
    values = np.stack([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
    window = np.ones(11)
    weights = np.convolve(np.ones(len(grid)), window, "same")  # fewer at both ends
    return grid, np.stack([np.convolve(row, window, "same") / weights for row in values])


if __name__ == "__main__":
    main()

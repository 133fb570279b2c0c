"""Variants of one configuration, several seeds each: a table of reward, KL, time and memory, and a plot of reward against KL.

    python benchmarks/learn/sweep.py recipes/trust_region/sweep.yaml --output runs/trust_region

The YAML names `base` (a configuration beside it), `seeds`, and `variants`: a name each, with the flags of `surefoot ppo`
that make it. Every run is a separate process; one that is finished is not run again, one that was interrupted is
resumed. Means and standard deviations (n - 1) are over seeds. Reward and KL to the reference are those of the held-out
prompts after the last update; step KL is KL(old‖new), the mean over updates, explained variance the mean over the second
half of them; CPU time and memory (its highest resident set) are the whole process's, of an interrupted run its last
process's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

SUREFOOT = str(Path(sys.executable).with_name("surefoot"))
Runs = dict[str, list[dict[str, Any]]]  # variant -> one result a seed


def main() -> None:
    """Run what is missing, then write `results.json`, `table.md` and `reward_and_kl.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the runs, the table and the plot"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at once, one thread each where there are several"
    )
    options = parser.parse_args()
    sweep = yaml.safe_load(options.sweep.read_text())
    base = options.sweep.parent / sweep["base"]
    if options.workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    # Seed by seed, so that a sweep that is cut short has seen every variant.
    cells = [(name, seed) for seed in sweep["seeds"] for name in sweep["variants"]]

    def run(cell: tuple[str, int]) -> dict[str, Any]:
        name, seed = cell
        return result_of(
            base, name, shlex.split(sweep["variants"][name] or ""), seed=seed, output=options.output
        )

    with ThreadPoolExecutor(options.workers) as pool:
        finished = list(pool.map(run, cells))
    results: Runs = {name: [] for name in sweep["variants"]}
    for (name, _), result in zip(cells, finished, strict=True):
        results[name].append(result)
    (options.output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    text = table(results)
    (options.output / "table.md").write_text(text)
    draw(options.output / "reward_and_kl.png", results)
    print(text)


def result_of(base: Path, name: str, flags: list[str], *, seed: int, output: Path) -> dict[str, Any]:
    """What a run left, which is run first if it was not."""
    slug = re.sub(r"[^\w.]+", "-", name)
    run, cost = output / f"{slug}-{seed}", output / f"{slug}-{seed}.cost.json"
    if not cost.is_file():
        if (run / "config.yaml").is_file():
            command = [SUREFOOT, "resume", str(run)]
        else:
            where = ["--run.folder", str(output), "--run.name", run.name, "--seed", str(seed)]
            command = [SUREFOOT, "ppo", str(base), *where, *flags]
        print(" ".join(command), flush=True)
        output.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"{name}, seed {seed}: ended with status {status}")
        cost.write_text(
            json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "memory_mib": used.ru_maxrss / 1024})
        )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "time/update_s" in row]
    held_out = [row for row in rows if "eval/reward" in row]
    parts = ("rollout", "score", "update")
    return {
        "seed": seed,
        "curve": [(row["update"], row["eval/kl"], row["eval/reward"]) for row in held_out],
        "reward": held_out[-1]["eval/reward"],
        "kl": held_out[-1]["eval/kl"],
        "step_kl": statistics.fmean(row["ppo/approx_kl"] for row in updates),
        "explained_variance": explained(updates[len(updates) // 2 :]),
        "seconds_an_update": statistics.median(
            sum(row[f"time/{part}_s"] for part in parts) for row in updates
        ),
        **json.loads(cost.read_text()),
    }


def explained(updates: list[dict[str, Any]]) -> float | None:
    """Mean over these updates of the share of the returns' variance that the critic explains; None without a critic."""
    values = [row["critic/explained_variance"] for row in updates if "critic/explained_variance" in row]
    return statistics.fmean(values) if values else None


def table(results: Runs) -> str:
    """One Markdown row a variant."""
    heads = [
        "",
        "reward",
        "KL to the reference, nats",
        "step KL, nats a token",
        "explained variance",
        "s an update (wall)",
    ]
    heads += ["CPU s a run", "memory, MiB"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in results.items():
        cells = [spread(runs, "reward", 3, sign="+"), spread(runs, "kl", 1), spread(runs, "step_kl", 3)]
        has_critic = runs[0]["explained_variance"] is not None
        cells.append(spread(runs, "explained_variance", 2) if has_critic else "no critic")
        cells += [
            f"{statistics.median(run[key] for run in runs):.{n}f}"
            for key, n in (("seconds_an_update", 1), ("cpu_s", 0))
        ]
        cells.append(f"{max(run['memory_mib'] for run in runs):.0f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(runs: list[dict[str, Any]], key: str, digits: int, *, sign: str = "") -> str:
    """Mean ± standard deviation over seeds."""
    values = [run[key] for run in runs]
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {std:.{digits}f}"


def draw(path: Path, results: Runs) -> None:
    """Held-out reward against KL to the reference, from evaluation to evaluation: a line a variant (mean over seeds), and where
    each seed ended.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        points = zip(*(run["curve"] for run in runs), strict=True)
        means = [[statistics.fmean(values) for values in zip(*point, strict=True)] for point in points]
        (line,) = axes.plot(
            [kl for _, kl, _ in means], [reward for *_, reward in means], marker="o", markersize=3, label=name
        )
        axes.scatter(
            [run["kl"] for run in runs],
            [run["reward"] for run in runs],
            color=line.get_color(),
            marker="x",
            s=25,
        )
    axes.set_xlabel("KL to the reference, nats per completion")
    axes.set_ylabel("held-out reward")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

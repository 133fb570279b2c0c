"""What few labels are worth, with and without unlabeled text: tables and a plot, three sizes, three seeds.

    python recipes/semi_supervised/measure.py                  # make recipe NAME=semi_supervised
    python recipes/semi_supervised/measure.py --quick          # one seed of 100 labels, few steps

Writing: the pipeline beside this file, with two more stages to compare with, PPO from the original model and
PPO from the fine-tuned one, both without demonstrations. Everything is scored on openings of the test set by
a judge, a reward model trained on ratings no stage ever sees, and by VADER's lexicon. Classification: the
accuracy of the labels that a policy writes for the test set, beside fine-tuning alone. What is finished is
not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

import data
from surefoot import PPO, SFT, RewardModel
from surefoot.rewards.sentiment import vader_compound

HERE = Path(__file__).parent
SUREFOOT = str(Path(sys.executable).with_name("surefoot"))
SEEDS = (0, 1, 2)
# Labels -> passes over them, for the examples and for the reward models: fewer labels are seen more often.
SIZES = {100: (4, 8), 300: (2, 4), 1000: (1, 1)}
CLASSIFIED = (100, 300)
TASKS = {"write": "writing", "label": "classification"}
# Stage -> its name in the table.
WRITERS = {
    "sft": "SFT",
    "ppo_alone": "PPO",
    "sft_ppo": "SFT, PPO",
    "ppo": "the recipe",
    "again": "and rejection sampling",
}
CLASSIFIERS = {"sft": "SFT", "ppo": "the recipe", "again": "and rejection sampling"}
QUICK = [
    *(
        "--stages.sft.sft.epochs",
        "1",
        "--stages.judge.reward_model.epochs",
        "1",
        "--stages.again.sft.epochs",
        "1",
    ),
    *("--stages.ppo.rollout.total-episodes", "48", "--stages.best.rejection-sampling.episodes", "32"),
]
Results = dict[str, dict[str, list[dict[str, float]]]]  # labels -> method -> one a seed


def main() -> None:
    """Run what is missing, judge it, write `results.json`, `table.md` and `labels.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="default runs/semi_supervised_measured, or runs/semi_supervised_quick"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? Its figures say nothing")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="pipelines at once, a thread each"
    )
    parser.add_argument(
        "--judge", nargs=2, metavar=("FOLDER", "TASK"), help=argparse.SUPPRESS
    )  # one cell, by itself
    options = parser.parse_args()
    if options.judge:
        judge_cell(options.output, Path(options.judge[0]), options.judge[1], quick=options.quick)
        return
    started = time.perf_counter()
    # Apart: what was finished is not run again, and a quick cell must not pass for a whole one.
    output = options.output or Path("runs") / (
        "semi_supervised_quick" if options.quick else "semi_supervised_measured"
    )
    sizes = [(size, seed) for seed in SEEDS for size in SIZES][: 1 if options.quick else None]
    cells = [
        (task, size, seed)
        for size, seed in sizes
        for task in ("write", "label")
        if task == "write" or size in CLASSIFIED
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        judge = pool.submit(run, judge_command(output, quick=options.quick))
        # The longest first, so that at the end no core waits for another's long one.
        longest_first = sorted(cells, key=lambda cell: (cell[0] == "label", -cell[1]))
        try:
            list(
                pool.map(
                    lambda cell: run_cell(output, *cell, judge=judge, quick=options.quick), longest_first
                )
            )
            judge.result()
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))
    results = {
        "writing": read(output, cells, "write", WRITERS),
        "classification": read(output, cells, "label", CLASSIFIERS),
    }
    original = PPO("smollm2-135m-instruct", verbose=0)
    for task, name in TASKS.items():
        results[name] = {
            "0": {"original model": [judged(task, output, quick=options.quick)(original)]},
            **results[name],
        }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    (output / "table.md").write_text(text)
    draw(output / "labels.png", results)
    print(f"{text}\n{(time.perf_counter() - started) / 60:.0f} minutes")


def run_cell(output: Path, task: str, size: int, seed: int, *, judge: Future[None], quick: bool) -> None:
    """One pipeline and its judging, unless that was done before. The models are removed then: 0.5 GB each."""
    folder = output / f"{size}-{seed}"
    if (folder / f"{task}.json").is_file():
        return
    data.prepare(folder / "data", labels=size, seed=seed)
    run(pipeline_command(folder, task, labels=size, seed=seed, quick=quick))
    judge.result()
    command = [
        sys.executable,
        str(HERE / "measure.py"),
        "--output",
        str(output),
        "--judge",
        str(folder),
        task,
    ]
    run([*command, *(["--quick"] if quick else [])], log=folder / f"{task}.log")
    shutil.rmtree(folder / task)


def judge_cell(output: Path, folder: Path, task: str, *, quick: bool) -> None:
    """Judge each stage's model in `folder`, and write `write.json` or `label.json` there."""
    judge = judged(task, output, quick=quick)
    stages = WRITERS if task == "write" else CLASSIFIERS
    found = {stage: judge(PPO.open(folder / task / stage / "model")) for stage in stages}
    (folder / f"{task}.json").write_text(json.dumps(found, indent=1) + "\n")


def judged(task: str, output: Path, *, quick: bool) -> Writing | Classification:
    """The evaluation of this task."""
    return (
        Writing(output / "judge" / "model", quick=quick) if task == "write" else Classification(quick=quick)
    )


def judge_command(output: Path, *, quick: bool) -> list[str]:
    """The judge, on ratings that no stage sees; nothing if it is there."""
    output.mkdir(parents=True, exist_ok=True)
    data.write(output / "judge.jsonl", data.sentences()["judge"][: 64 if quick else None])
    stage = {
        "reward_model": {
            "data": "judge.jsonl",
            "rating_range": [-4, 4],
            "learning_rate": 5e-4,
            "epochs": 1,
            "batch_size": 8,
        }
    }
    common = {"evaluate": {"every": None, "episodes": 128}}
    (output / "judge.yaml").write_text(
        yaml.safe_dump({"folder": ".", "common": common, "stages": {"judge": stage}})
    )
    return [SUREFOOT, "pipeline", str(output / "judge.yaml")]


def pipeline_command(folder: Path, task: str, *, labels: int, seed: int, quick: bool) -> list[str]:
    """One pipeline beside this file, with the stages to compare with, in its own folder."""
    pipeline = yaml.safe_load(
        (HERE / {"write": "pipeline.yaml", "label": "pipeline_labels.yaml"}[task]).read_text()
    )
    pipeline["folder"] = task
    stages = pipeline["stages"]
    if task == "write":
        plain = copy.deepcopy(stages["ppo"])
        del plain["ptx"]
        alone = {key: value for key, value in plain.items() if key != "policy"}
        stages |= {"sft_ppo": plain, "ppo_alone": copy.deepcopy(alone)}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(pipeline)), sort_keys=False))
    examples, preferences = SIZES[labels]
    if task == "label":
        preferences = max(preferences // 2, 1)  # a pair is two texts
    # The stages' own evaluations are not needed here, and change nothing.
    flags = [
        "--common.seed",
        str(seed),
        "--common.evaluate.episodes",
        "0",
        "--stages.sft.sft.epochs",
        str(examples),
    ]
    flags += [
        "--stages.judge.reward_model.epochs",
        str(preferences),
        "--stages.again.sft.epochs",
        str(max(examples // 2, 1)),
    ]
    flags += QUICK if quick else []
    if quick and task == "write":
        flags += [
            "--stages.sft_ppo.rollout.total-episodes",
            "48",
            "--stages.ppo_alone.rollout.total-episodes",
            "48",
        ]
    return [SUREFOOT, "pipeline", str(folder / f"{task}.yaml"), *flags]


def run(command: list[str], *, log: Path | None = None) -> None:
    """One process with one thread, its output in a file. Raises RuntimeError if it fails."""
    log = log or Path(command[2]).with_suffix(".log")
    with log.open("a") as file:
        ended = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
    print(f"{'done' if ended.returncode == 0 else 'FAILED'}: {' '.join(command[1:])}", flush=True)
    if ended.returncode != 0:
        raise RuntimeError(f"stopped; see {log}")


class Writing:
    """The judge's score of a policy's reviews, and the policy's perplexity on people's."""

    def __init__(self, judge: Path, *, quick: bool):
        rows = data.sentences()["test"]
        good = [data.opening(row["text"]) for row in rows if row["rating"] >= data.GOOD]
        self.reviews = [{"prompt": prompt, "completion": rest} for prompt, rest in good]
        rows = rows[: 16 if quick else 120]
        self.openings = [data.opening(row["text"])[0] for row in rows]
        self.judge = RewardModel.load(judge, verbose=0)

    def __call__(self, policy: PPO) -> dict[str, float]:
        """Means over the test's openings, one review each; perplexity on good reviews in the test."""
        reviews = policy.generate(self.openings, max_new_tokens=24, temperature=1.0)
        with tempfile.TemporaryDirectory() as folder:  # of a run that only evaluates
            peoples = SFT(policy.policy, self.reviews, held_out=0.9, run_folder=folder, verbose=0)
            perplexity = peoples.evaluate()["eval/perplexity"]
        texts = [opening + review for opening, review in zip(self.openings, reviews, strict=True)]
        return {
            "judge": statistics.fmean(self.judge.score([""] * len(texts), texts)),
            "VADER": statistics.fmean(vader_compound(completions=texts)),
            "perplexity": perplexity,
            "distinct words": len({word for review in reviews for word in review.split()})
            / len(" ".join(reviews).split()),
        }


class Classification:
    """How often the label that a policy writes is the one people gave."""

    def __init__(self, *, quick: bool):
        rows = [row for row in data.sentences()["test"] if abs(row["rating"]) >= data.CLEAR][
            : 16 if quick else 200
        ]
        self.questions = [data.question(row["text"]) for row in rows]
        self.labels = [data.label(row["rating"]) for row in rows]

    def __call__(self, policy: PPO) -> dict[str, float]:
        """Fraction of the test's sentences."""
        written = policy.generate(self.questions, max_new_tokens=2, temperature=0.0)
        return {"accuracy": statistics.fmean(a == b for a, b in zip(written, self.labels, strict=True))}


def read(output: Path, cells: list[tuple[str, int, int]], wanted: str, methods: dict[str, str]) -> Results:
    """What the cells of one task left, by number of labels and method."""
    results: Results = {}
    for task, size, seed in cells:
        if task == wanted:
            found = json.loads((output / f"{size}-{seed}" / f"{task}.json").read_text())
            for stage, name in methods.items():
                results.setdefault(str(size), {}).setdefault(name, []).append({"seed": seed, **found[stage]})
    return results


def tables(results: dict[str, Results]) -> str:
    """Mean ± standard deviation over seeds, in Markdown."""
    lines = []
    for task, by_size in results.items():
        keys = [key for key in by_size["0"]["original model"][0] if key != "seed"]
        lines += [f"| {task}: labels | method | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
        for size, methods in by_size.items():
            for method, runs in methods.items():
                cells = [spread([run[key] for run in runs]) for key in keys]
                lines.append(f"| {size} | {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (n - 1)."""
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def draw(path: Path, results: dict[str, Results]) -> None:
    """The judge's score, the perplexity of people's reviews and the accuracy, by number of labels."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = [
        ("writing", "judge", "the judge's score of what it writes"),
        ("writing", "perplexity", "perplexity of people's good reviews"),
        ("classification", "accuracy", "accuracy of the label it writes"),
    ]
    lines: dict[str, Any] = {}
    for axes, (task, key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        by_size = results[task]
        sizes = [size for size in by_size if size != "0"]
        for method in by_size[sizes[0]]:
            values = [[run[key] for run in by_size[size][method]] for size in sizes]
            stds = [statistics.stdev(runs) if len(runs) > 1 else 0.0 for runs in values]
            means = [statistics.fmean(runs) for runs in values]
            color = lines[method].lines[0].get_color() if method in lines else None
            line = axes.errorbar(
                [int(s) for s in sizes], means, yerr=stds, marker="o", capsize=3, color=color
            )
            lines.setdefault(method, line)
        if key != "accuracy":  # the original model writes no label at all
            lines["original model"] = axes.axhline(
                by_size["0"]["original model"][0][key], color="gray", linestyle=":"
            )
        axes.set_xscale("log")
        axes.set_xticks([int(size) for size in sizes], sizes)
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

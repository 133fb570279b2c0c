"""A reward model from people's ratings of sentences, beside VADER's lexicon, within and across domains.

python recipes/reward_model/train.py --ratings 2500             a few minutes on two cores
python recipes/reward_model/train.py --domain product-reviews   trains on those instead
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch

from surefoot import RewardModel
from surefoot.core.preference import pearson, share_in_order, spearman
from surefoot.data.assets import fetch
from surefoot.rewards.sentiment import vader_compound

DOMAINS = ("movie-reviews", "product-reviews", "tweets")


def rated_sentences(domain: str, count: int | None = None) -> list[dict[str, Any]]:
    """`count` of the domain's sentences with their mean rating by twenty people, -4 to 4."""
    rows = [json.loads(line) for line in fetch(domain).read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [{"text": row["prompt"], "rating": row["rating"]} for row in rows[:count]]


def compare(model: RewardModel, domain: str, rows: list[dict[str, Any]]) -> None:
    """Print how far the model and VADER agree with people."""
    texts, ratings = [row["text"] for row in rows], torch.tensor([row["rating"] for row in rows])
    scores = torch.tensor(model.score([""] * len(texts), texts))
    for name, judged in (
        ("reward model", scores),
        ("VADER", torch.tensor(vader_compound(completions=texts))),
    ):
        agreed = f"{pearson(judged, ratings):9.3f}{spearman(judged, ratings):10.3f}"
        agreed += f"{share_in_order(judged, ratings):16.3f}"
        print(f"{domain:17}{name:14}{agreed}", flush=True)


def main() -> None:
    """Train on one domain, then print the agreement with people on held-out sentences of all domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", choices=DOMAINS, default=DOMAINS[0], help="what is learned from")
    parser.add_argument("--ratings", type=int, default=2500, help="sentences used, a fifth of them held out")
    parser.add_argument("--others", type=int, default=500, help="sentences of each other domain to be judged")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the language model under the head")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="fewer ratings want more")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the model's head, its adapter and the order of the sentences"
    )
    parser.add_argument("--save", default=None, metavar="FOLDER", help="leave the reward model here")
    options = parser.parse_args()
    data = rated_sentences(options.domain, options.ratings)
    settings = {
        "rating_range": [-4, 4],
        "held_out": 0.2,
        "epochs": 2,
        "evaluate_episodes": 128,
        "seed": options.seed,
        "learning_rate": options.learning_rate,
    }
    model = RewardModel(options.model, data, **settings).learn()
    assert model.data is not None
    held_out = [
        {"text": preference.texts[0], "rating": preference.label} for preference in model.data.held_out
    ]
    print(f"{len(model.data.train)} ratings of {options.domain} learned from, {len(held_out)} held out")
    print(f"{'':31}{'Pearson':>9}{'Spearman':>10}{'pairs in order':>16}")
    for domain in sorted(DOMAINS, key=lambda domain: domain != options.domain):
        compare(
            model, domain, held_out if domain == options.domain else rated_sentences(domain, options.others)
        )
    if options.save:
        model.save(options.save)


if __name__ == "__main__":
    main()

"""A reward model from people's ratings of movie-review sentences, beside VADER's lexicon on the same sentences.

python recipes/reward_model/train.py --ratings 2500      a few minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch

from surefoot import RewardModel
from surefoot.assets import fetch
from surefoot.core.judgements import pearson, share_in_order, spearman
from surefoot.rewards.sentiment import vader_compound


def rated_sentences(count: int) -> list[dict[str, Any]]:
    """`count` of the 10,605 sentences with their mean rating by twenty people, -4 to 4."""
    rows = [json.loads(line) for line in fetch("movie-reviews").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [{"text": row["prompt"], "rating": row["rating"]} for row in rows[:count]]


def main() -> None:
    """Train, then print both agreements with people on the sentences held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=2500, help="sentences used, a fifth of them held out")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the language model under the head")
    parser.add_argument("--seed", type=int, default=0, help="of the model's head, its adapter and the order of the sentences")
    parser.add_argument("--save", default=None, metavar="FOLDER", help="leave the reward model here")
    options = parser.parse_args()
    data = rated_sentences(options.ratings)
    settings = {"rating_range": [-4, 4], "held_out": 0.2, "epochs": 2, "evaluate_episodes": 128, "seed": options.seed}
    model = RewardModel(options.model, data, **settings).learn()
    assert model.data is not None
    texts = [judgement.texts[0] for judgement in model.data.held_out]
    ratings = torch.tensor([judgement.label for judgement in model.data.held_out])
    print(f"{len(model.data.train)} ratings learned from, {len(texts)} held out")
    print(f"{'':14}{'Pearson':>9}{'Spearman':>10}{'pairs in order':>16}")
    for name, scores in (
        ("reward model", model.score([""] * len(texts), texts)),
        ("VADER", vader_compound(completions=texts)),
    ):
        judged = torch.tensor(scores)
        print(
            f"{name:14}{pearson(judged, ratings):9.3f}{spearman(judged, ratings):10.3f}{share_in_order(judged, ratings):16.3f}"
        )
    if options.save:
        model.save(options.save)


if __name__ == "__main__":
    main()

"""Batches of demonstrations and their likelihood, held to transformers' own cross-entropy."""

import math
from typing import Any

import pytest
import torch

from surefoot.config import SFTConfig
from surefoot.data.demonstrations import Demonstrations
from surefoot.data.rows import index_in_order
from surefoot.rollout.demonstrations import DemonstrationRollout
from tests.golden import refused
from tests.tiny import CONTEXT, END, VOCABULARY, tiny_policy, tiny_tokenizer

CHAT = [
    {"role": role, "content": content}
    for role, content in zip(["user", "assistant"] * 2, ["hi", "the end", "in?", "an hour"], strict=True)
]


def rollout_of(data: Any, policy: Any = None, *, held_out: float = 0.0, **settings: Any) -> DemonstrationRollout:
    policy = policy or tiny_policy(tokenizer=tiny_tokenizer(chat=True))
    return DemonstrationRollout(policy, Demonstrations(data, held_out=held_out), sft=SFTConfig(**settings), seed=3)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize(
    "data",
    [
        ["the film was good", "a", "in the end there were two"],
        [{"prompt": "the film", "completion": " was good"}, {"prompt": "a", "completion": " band. and the end"}],
        [{"messages": CHAT}, {"messages": CHAT[2:4]}],
    ],
    ids=["text", "pairs", "chat"],
)
def test_the_loss_is_transformers_own_cross_entropy(data, adapter):
    policy = tiny_policy(adapter=adapter, moved=True, tokenizer=tiny_tokenizer(chat=True))
    # Several micro-batches; the labels are -100 wherever nothing is trained, as transformers has it.
    rollout = rollout_of(data, policy, micro_batch_tokens=24)
    rollout._held_out, rollout.data.held_out = rollout._train, rollout.data.train
    metrics, shown = rollout.evaluate(9)
    total, count = 0.0, 0
    for row, example in zip(rollout._train, shown, strict=True):
        labels = [token if is_trained else -100 for token, is_trained in zip(row.tokens, row.loss_mask, strict=True)]
        with torch.no_grad():
            loss = float(policy.lm(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([labels])).loss)
        assert example.nll == pytest.approx(loss, rel=1e-5)
        total, count = total + loss * sum(row.loss_mask), count + sum(row.loss_mask)
    assert metrics["eval/nll"] == pytest.approx(total / count, rel=1e-5) and metrics["eval/metric"] == -metrics["eval/nll"]


def test_knowing_nothing_has_the_perplexity_of_the_vocabulary():
    policy = tiny_policy()
    torch.nn.init.zeros_(policy.lm.get_output_embeddings().weight)
    rollout = rollout_of([f"the film {n}" for n in range(20)], policy, held_out=0.5)
    metrics, _ = rollout.evaluate(20)
    assert metrics["eval/perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert metrics["eval/nll"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_every_epoch_is_a_pass_in_an_order_of_its_own():
    texts = [f"{number} the end" for number in range(10)]
    rollout = rollout_of(texts, batch_size=4)
    tokenizer = tiny_tokenizer()

    def epoch(number: int, seed: int = 3) -> list[str]:
        return [texts[index_in_order(10 * number + place, len(rollout.data.train), seed)] for place in range(10)]

    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(texts) and len({*map(tuple, (epoch(0), epoch(1), epoch(0, 4)))}) == 3
    # Batches go on where the last one ended, across the end of an epoch too; each call stands alone.
    for first in (0, 4, 8):
        batch = rollout.collect(first=first, count=4)
        rows = [tokenizer.decode(row[row != 0]) for row in batch.observations["tokens"]]
        assert rows == [text + "<eos>" for text in (epoch(0) + epoch(1))[first : first + 4]]
        assert batch.metrics["sft/epoch"] == (first + 4) / 10 and not len(batch.rewards_BT)


def test_long_examples_are_cut_and_counted_or_refused():
    rows = [{"prompt": "in the", "completion": " end" * n} for n in (1, 2, 30)]
    rollout = rollout_of(rows, max_tokens=20)
    assert rollout.notice == "1 of 3 examples are cut to sft.max_tokens (20)"
    lengths = sorted(len(example.tokens) for example in rollout._train)
    assert lengths[-1] == 20 and lengths[0] < lengths[1] < 20
    cut = next(example for example in rollout._train if len(example.tokens) == 20)
    assert cut.tokens[-1] != END and cut.loss_mask[-1]  # nobody ended there
    with refused("data, row 3", f"context of {CONTEXT}", "sft.max_tokens"):
        rollout_of(rows)
    with refused("data, row 1", "2 tokens", "sft.max_tokens"):
        rollout_of(rows, max_tokens=2)
    with refused("sft.max_tokens (97)", f"context of {CONTEXT}"):
        rollout_of(rows, max_tokens=97)


def test_other_examples_have_another_digest():
    rollout = rollout_of(["a", "the"], batch_size=16)
    assert rollout.per_update == 2  # no more than there are
    assert rollout.inputs == rollout_of(["a", "the"]).inputs != rollout_of(["a", "then"]).inputs

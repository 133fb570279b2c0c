"""Trajectories as one padded batch, and its way into minibatches and micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from surefoot.data.batches import micro_batches, minibatches
from surefoot.rollout.batch import text_batch
from surefoot.types import Completion, StopReason, Trajectory
from tests.tiny import random_tokens, written_batch


def test_the_batch_of_the_worked_example():
    one = Completion([21, 2], [-1.2, -0.3], [0.1, 0.4], [1.0, 0.5], StopReason.END_TOKEN, version=6)
    two = Completion([2], [-0.7], [0.2], [0.6], StopReason.END_TOKEN, version=5)
    trajectories = [Trajectory("", (11, 12), one, ""), Trajectory("", (13, 14), two, "")]
    batch = text_batch(trajectories, device=torch.device("cpu"))
    assert batch.observations["tokens"].tolist() == [[11, 12, 21, 2], [13, 14, 2, 0]]
    assert batch.observations["lengths"].tolist() == [4, 3]
    assert batch.mask_BT.tolist() == [[False, False, True, True], [False, False, True, False]]
    assert batch.ends_BT.tolist() == [[False, False, False, True], [False, False, True, False]]
    assert torch.equal(batch.logprobs_BT, torch.tensor([[0, 0, -1.2, -0.3], [0, 0, -0.7, 0]]))
    assert torch.equal(batch.values_BT, torch.tensor([[0, 0, 0.1, 0.4], [0, 0, 0.2, 0]]))
    assert batch.rewards_BT.tolist() == batch.bootstrap_BT.tolist() == [[0.0] * 4] * 2
    assert batch.version == 5


def test_a_token_equal_to_the_filler_is_masked_by_length_and_not_by_value():
    batch = written_batch([((0, 0), (0, 0, 0)), ((5,), (0,))])
    assert batch.mask_BT.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]


def test_rows_are_cut_to_the_longest_of_them():
    batch = written_batch([((1, 2), (3, 4, 5)), ((1,), (2,)), ((1,), (2, 3))])
    part = batch.rows(torch.tensor([2, 1]))
    assert part.observations["tokens"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert part.mask_BT.shape == part.logprobs_BT.shape == (2, 3)
    assert part.trajectories == []  # they stay with the whole batch


def test_minibatches_are_a_shuffled_pass_that_leaves_nobody_out():
    batch = written_batch([((1,), (2,))] * 10)
    generator = torch.Generator().manual_seed(0)
    first, second = ([rows.tolist() for _, rows in minibatches(batch, 4, generator)] for _ in range(2))
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(10))
    assert first != second


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
def test_micro_batches_keep_to_the_token_budget_and_leave_nobody_out(budget):
    lengths = [3, 9, 1, 4, 4, 12, 2, 7, 5, 5, 1, 8]
    batch = written_batch([((1,), random_tokens(n, seed=n)) for n in lengths])
    rows = torch.tensor([11, 0, 5, 3, 2, 7, 8])
    groups = micro_batches(batch, rows, budget)
    assert sorted(torch.cat(groups).tolist()) == sorted(rows.tolist())
    for group in groups:
        width = batch.rows(group).mask_BT.shape[1]
        assert len(group) == 1 or len(group) * width <= budget
    if budget == 10_000:
        assert len(groups) == 1

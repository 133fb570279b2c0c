"""Trajectories as one padded batch, and its way into minibatches and micro-batches."""

from collections.abc import Sequence

import pytest
import torch

from surefoot.core.advantages import gae
from surefoot.data.batches import micro_batches
from surefoot.rollout.batch import text_batch
from surefoot.types import Batch, StopReason, Trajectory, Turn
from tests.tiny import random_tokens, written_batch

CPU = torch.device("cpu")


def prompt(*tokens: int) -> Turn:
    return Turn(tokens, "said")


def written(tokens: Sequence[int], values: Sequence[float], reward: float = 0.0, version: int = 0) -> Turn:
    """What the policy wrote, each log-prob a tenth of its token."""
    logprobs, entropies = [-token / 10 for token in tokens], [0.5] * len(tokens)
    return Turn(tokens, "wrote", True, logprobs, values, entropies, reward, version)


def batch_of(*conversations: list[Turn]) -> Batch:
    return text_batch([Trajectory("", turns, StopReason.END_TOKEN) for turns in conversations], device=CPU)


def test_the_batch_of_the_worked_example():
    first, second = written([21, 2], [0.1, 0.4], 0.6, version=6), written([2], [0.2], 0.1, version=5)
    batch = batch_of([prompt(11, 12), first], [prompt(13, 14), second])
    assert batch.observations["tokens"].tolist() == [[11, 12, 21, 2], [13, 14, 2, 0]]
    assert batch.observations["lengths"].tolist() == [4, 3]
    # The mask is by turns: tokens equal to the filler are completion tokens like others.
    assert written_batch([((0, 0), (0, 0)), ((5,), (0,))]).mask_BT.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.mask_BT.tolist() == [[False, False, True, True], [False, False, True, False]]
    assert batch.ends_BT.tolist() == [[False, False, False, True], [False, False, True, False]]
    assert torch.equal(batch.logprobs_BT, torch.tensor([[0, 0, -2.1, -0.2], [0, 0, -0.2, 0]]))
    assert torch.equal(batch.values_BT, torch.tensor([[0, 0, 0.1, 0.4], [0, 0, 0.2, 0]]))
    assert torch.equal(batch.rewards_BT, torch.tensor([[0, 0, 0, 0.6], [0, 0, 0.1, 0]]))
    assert (batch.bootstrap_BT == 0).all() and batch.version == 5


# Two tokens, what a tool says in six, two tokens; V is 1 less the values of λ = 1.
TOY = [prompt(1, 2, 3), written([11, 12], [0.2, 0.3]), prompt(*[9] * 6), written([13, 2], [0.5, 0.6], reward=1.0)]


def advantages(batch: Batch, lam: float) -> list[list[float]]:
    """γ = 1; of the policy's tokens."""
    columns = {name: getattr(batch, name) for name in ("mask_BT", "ends_BT", "bootstrap_BT")}
    advantages_BT = gae(batch.rewards_BT, batch.values_BT, **columns, gamma=1.0, lam=lam)[0]
    return [row[mask].tolist() for row, mask in zip(advantages_BT, batch.mask_BT, strict=True)]


def test_what_others_said_is_masked_and_each_turn_is_paid_where_it_ends():
    others = (Turn([9, 9], reward=0.5), Turn([8], reward=-1.0))
    late = [prompt(1), written([11], [0.1], 0.25), others[0], written([12, 2], [0.2, 0.3]), others[1]]
    batch = batch_of(TOY, late)
    assert batch.observations["lengths"].tolist() == [13, 6]  # nothing after the policy's last token is kept
    assert batch.observations["tokens"][0].tolist() == [1, 2, 3, 11, 12, 9, 9, 9, 9, 9, 9, 13, 2]
    assert batch.mask_BT.nonzero().tolist() == [[0, 3], [0, 4], [0, 11], [0, 12], [1, 1], [1, 4], [1, 5]]
    assert batch.ends_BT.nonzero().tolist() == [[0, 12], [1, 5]]
    # What the others' turns paid goes on the policy's last token before it.
    assert batch.rewards_BT.to_sparse().indices().T.tolist() == [[0, 12], [1, 1], [1, 5]]
    assert batch.rewards_BT.to_sparse().values().tolist() == [1.0, 0.75, -1.0]
    assert (batch.logprobs_BT[~batch.mask_BT] == 0).all() and (batch.values_BT[~batch.mask_BT] == 0).all()


def test_advantages_cross_what_others_said_in_one_step():
    padding = [prompt(1), written([2] * 16, [0.0] * 16)]
    for lam, expected in ((1.0, [0.8, 0.7, 0.5, 0.4]), (0.95, [0.7232, 0.656, 0.48, 0.4])):
        assert advantages(batch_of(TOY, padding), lam)[0] == pytest.approx(expected, abs=1e-6)


def test_the_line_of_samples_has_the_turns_where_there_are_more_than_two():
    record = Trajectory("said", TOY, StopReason.LENGTH, reward=1.0, kl=0.1).record()
    assert (record["completion"], record["tokens"], record["reward"]) == ("wrotewrote", 4, {"reward": 1.0})
    assert [turn["by_policy"] for turn in record["turns"]] == [False, True, False, True]
    assert record["turns"][3] == {"text": "wrote", "by_policy": True, "reward": 1.0}
    assert "turns" not in Trajectory("said", TOY[:2], StopReason.LENGTH).record()


def test_rows_are_cut_to_the_longest_of_them():
    part = written_batch([((1, 2), (3, 4, 5)), ((1,), (2,)), ((1,), (2, 3))]).rows(torch.tensor([2, 1]))
    assert part.observations["tokens"].tolist() == [[1, 2, 3], [1, 2, 0]] and part.trajectories == []
    assert part.mask_BT.shape == part.logprobs_BT.shape == (2, 3)


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
def test_micro_batches_keep_to_the_token_budget_and_leave_nobody_out(budget):
    lengths = [3, 9, 1, 4, 4, 12, 2, 7, 5, 5, 1, 8]
    batch = written_batch([((1,), random_tokens(n, seed=n)) for n in lengths])
    rows = torch.tensor([11, 0, 5, 3, 2, 7, 8])
    groups = micro_batches(batch, rows, budget)
    assert sorted(torch.cat(groups).tolist()) == sorted(rows.tolist())
    for group in groups:
        assert len(group) == 1 or len(group) * batch.rows(group).mask_BT.shape[1] <= budget
    assert budget < 10_000 or len(groups) == 1


def test_a_turn_of_the_policy_needs_a_log_prob_and_a_value_for_each_token():
    with pytest.raises(ValueError, match="2 tokens"):
        batch_of([prompt(11), Turn((21, 2), "wrote", True)])

"""Losses and agreements of a reward model against numbers worked by hand."""

import math

import pytest
import torch

from surefoot.core.preference import dpo_loss, pearson, preference_loss, rating_loss, reliability, share_in_order, spearman


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_preference_loss_gives_the_numbers_worked_by_hand():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-2.0, 1.0], [5.0, 5.0]])
    found = preference_loss(scores, tensor(0.0, 1.0, 0.0, 0.0))
    # log(1 + e^-1); a margin of 1 takes the lead away: log 2; a pair in the wrong order: log(1 + e^3); a tie: log 2.
    assert found.tolist() == pytest.approx([0.3132617, 0.6931472, 3.0485874, 0.6931472], abs=1e-6)
    centered = preference_loss(scores, torch.zeros(4), center=0.01)
    assert (centered - preference_loss(scores, torch.zeros(4))).tolist() == pytest.approx([0.01, 0.01, 0.01, 1.0], abs=1e-5)


def test_preference_gradient_lifts_the_chosen_and_lowers_the_rejected():
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [1.0, 1.0]], requires_grad=True)
    preference_loss(scores, torch.zeros(3)).sum().backward()
    # ∓σ(-(r_c - r_r)): ½ at a tie, ¼ where the odds are 3 to 1.
    assert scores.grad.tolist() == [pytest.approx(row) for row in ([-0.5, 0.5], [-0.25, 0.25], [-0.5, 0.5])]
    scores.grad = None
    preference_loss(scores, torch.zeros(3), center=0.1).sum().backward()
    assert scores.grad[2].tolist() == pytest.approx([-0.5 + 0.4, 0.5 + 0.4])  # 2c (r_c + r_r) on both


def test_preference_loss_of_far_scores_is_finite():
    scores = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = preference_loss(scores, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [2e4, 0.0] and scores.grad is not None and scores.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_dpo_loss_is_the_preference_loss_of_its_implicit_rewards():
    logprobs = torch.tensor([[-1.0, -4.0], [-3.0, -1.0]], requires_grad=True)
    found, rewards = dpo_loss(logprobs, torch.tensor([[-2.0, -3.0], [-3.0, -1.0]]), beta=0.5, label_smoothing=0.1)
    # Rewards ±½: log(1 + e^-1), and with a tenth of doubt log(1 + e) for it; at the reference log 2 and ∓β/2 · 0.8.
    assert rewards.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert found.tolist() == pytest.approx([0.9 * 0.3132617 + 0.1 * 1.3132617, math.log(2)], abs=1e-6)
    found.sum().backward()
    assert logprobs.grad is not None and logprobs.grad[1].tolist() == pytest.approx([-0.2, 0.2])


def test_rating_loss_is_half_the_squared_error():
    scores = torch.tensor([[2.5], [-1.0]], requires_grad=True)
    loss = rating_loss(scores, tensor(1.0, 1.0))
    loss.sum().backward()
    assert loss.tolist() == [1.125, 2.0] and scores.grad is not None and scores.grad.tolist() == [[1.5], [-2.0]]


def test_correlations_give_the_numbers_worked_by_hand():
    assert pearson(tensor(1, 2, 3), tensor(1, 2, 4)) == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    assert spearman(tensor(1, 2, 3), tensor(1, 2, 4)) == pytest.approx(1) == -spearman(tensor(3, 2, 1), tensor(1, 2, 4))
    assert spearman(tensor(5, 5, 9), tensor(1, 2, 3)) == pytest.approx(math.sqrt(3) / 2)  # ranks 1½, 1½, 3
    assert pearson(tensor(1, 1), tensor(1, 2)) == 0.0


def test_pairs_of_unlike_ratings_are_counted_once_each():
    assert share_in_order(tensor(1, 2, 3), tensor(1, 3, 2)) == pytest.approx(2 / 3)
    assert share_in_order(tensor(1, 1, 7), tensor(1, 2, 2)) == pytest.approx(0.75)  # a tie, one in order, one not counted
    assert share_in_order(tensor(1, 2), tensor(3, 3)) == 0.5


def test_bins_and_their_error_by_hand():
    # Two bins of ten: predictions .1 (observed 0, 2 of 10 are 1) and .9 (all are 1), given in no order.
    predicted = torch.tensor([0.9, 0.1] * 10)
    observed = torch.tensor([1.0, 1.0, 1.0, 1.0] + [1.0, 0.0] * 8)
    rows, error = reliability(predicted, observed)
    assert [row["predicted"] for row in rows] == pytest.approx([0.1, 0.9])
    assert [row["observed"] for row in rows] == pytest.approx([0.2, 1.0]) and [row["count"] for row in rows] == [10, 10]
    # Of two ones in ten the sample variance is (2 · .8² + 8 · .2²) / 9 = 1.6 / 9.
    assert [row["standard_error"] for row in rows] == pytest.approx([math.sqrt(1.6 / 9 / 10), 0.0])
    assert error == pytest.approx(0.1)
    assert len(reliability(predicted[:9], observed[:9])[0]) == 1 and len(reliability(predicted, observed, bins=1)[0]) == 1
    many = torch.linspace(0, 1, 1000)
    rows, error = reliability(many, many)
    assert len(rows) == 10 and error == pytest.approx(0, abs=1e-6)

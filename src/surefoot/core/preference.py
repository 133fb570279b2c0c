"""Losses on pairs and ratings, of a reward model and of DPO, and how well scores agree with them."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Bin = dict[str, float]


def preference_loss(scores_B2: Tensor, margins_B: Tensor, *, center: float = 0.0) -> Tensor:
    """-log σ(r_chosen - r_rejected - margin) + center · (r_chosen + r_rejected)² for each pair, [B], nats.

    `scores_B2` has the chosen side first. Bradley & Terry 1952; Stiennon et al. 2020, arXiv:2009.01325;
    margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2; centring: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    chosen, rejected = scores_B2.unbind(1)
    return -logsigmoid(chosen - rejected - margins_B) + center * (chosen + rejected) ** 2


def dpo_loss(
    logprobs_B2: Tensor, reference_B2: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(ε - 1) log σ(m) - ε log σ(-m) for each pair, [B], nats; and the implicit rewards r, [B, 2].

    r = β (log π - log π_ref) of whole completions, the chosen one first, m = r_chosen - r_rejected: the loss
    of the reward model that the policy itself is (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label
    smoothing ε Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO").
    """
    ratios_B2 = logprobs_B2 - reference_B2
    margins_B = beta * (ratios_B2[:, 0] - ratios_B2[:, 1])
    losses_B = -(1 - label_smoothing) * logsigmoid(margins_B) - label_smoothing * logsigmoid(-margins_B)
    return losses_B, beta * ratios_B2


def rating_loss(scores_B1: Tensor, ratings_B: Tensor) -> Tensor:
    """½ (r - rating)² for each text, [B]."""
    return torch.square(scores_B1.squeeze(1) - ratings_B) * 0.5


def reliability(predicted_N: Tensor, observed_N: Tensor, bins: int = 10) -> tuple[list[Bin], float]:
    """How observations agree with predictions: bins of equal size, by rising prediction, and their error.

    A bin has the means of both, the standard error of the observed mean, and its size, 10 texts at least. The
    error is the mean over all texts of |predicted - observed| of their bins: for probabilities the expected
    calibration error (Guo et al. 2017, arXiv:1706.04599, with bins of equal width).
    """
    order = predicted_N.argsort(stable=True)
    rows: list[Bin] = []
    for piece in order.tensor_split(max(1, min(bins, len(order) // 10))):
        observed, count = observed_N[piece].double(), float(len(piece))
        error = float(observed.std()) / count**0.5 if count > 1 else 0.0
        means = {"predicted": float(predicted_N[piece].double().mean()), "observed": float(observed.mean())}
        rows.append({**means, "standard_error": error, "count": count})
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in rows) / len(order)
    return rows, error


def share_of_pairs_in_order(scores_B2: Tensor) -> float:
    """Share of pairs whose chosen side has the higher score; equal scores count half."""
    return float((0.5 + 0.5 * (scores_B2[:, 0] - scores_B2[:, 1]).sign()).mean())


def pearson(one_N: Tensor, other_N: Tensor) -> float:
    """Correlation of two lists of numbers, -1 to 1; 0 if either is constant."""
    one, other = (values.double() - values.double().mean() for values in (one_N, other_N))
    spread = float(one.norm() * other.norm())
    return float(one @ other) / spread if spread > 0 else 0.0


def spearman(one_N: Tensor, other_N: Tensor) -> float:
    """Correlation of the ranks, equal numbers sharing their mean rank."""
    found = [numbers_N.unique(return_inverse=True, return_counts=True)[1:] for numbers_N in (one_N, other_N)]
    return pearson(*((counts.cumsum(0) - (counts - 1) / 2.0)[which_N] for which_N, counts in found))


def share_in_order(scores_N: Tensor, ratings_N: Tensor) -> float:
    """Fraction of pairs of unequal ratings whose scores are in the same order; equal scores count half."""
    agreed = unlike = 0.0
    for scores_M, ratings_M in zip(scores_N.split(1024), ratings_N.split(1024), strict=True):  # not [N, N]
        order_MN = (ratings_M[:, None] - ratings_N).sign()
        agreed += float(((scores_M[:, None] - scores_N).sign() * order_MN).sum())
        unlike += float((order_MN != 0).sum())
    return 0.5 + 0.5 * agreed / unlike if unlike else 0.5

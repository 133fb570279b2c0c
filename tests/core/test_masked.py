"""Means, variances and whitening over a mask."""

import math

import pytest
import torch
from torch import Tensor

from surefoot.core.masked import explained_variance, masked_mean, masked_sum, masked_var, whiten

GRID = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
# Huang et al., "The N Implementation Details of RLHF with PPO" (2023); torch's own, unbiased variance gives .1394 ... 3.0606.
WHITENED = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]


def everything(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_whitening_uses_the_population_variance() -> None:
    kept = whiten(GRID, everything(GRID), shift_mean=False)
    assert kept.flatten().tolist() == pytest.approx(WHITENED, abs=1e-4)
    shifted = whiten(GRID, everything(GRID))
    assert shifted.flatten().tolist() == pytest.approx([x - 1.6 for x in WHITENED], abs=1e-4)
    with_n_minus_1 = (GRID - GRID.mean()) / GRID.std()  # as TRL and Stable-Baselines3 divide
    assert torch.allclose(shifted, with_n_minus_1 * (9 / 8) ** 0.5, atol=1e-5)


@pytest.mark.parametrize("values", [[[3.7]], [[-2.5, -2.5, -2.5, -2.5]], [[0.0, 0.0]]])
def test_whitening_one_value_or_equal_values_gives_zero(values: list[list[float]]) -> None:
    tensor = torch.tensor(values)
    assert whiten(tensor, everything(tensor)).eq(0).all()
    assert torch.equal(whiten(tensor, everything(tensor), shift_mean=False), tensor)


@pytest.mark.parametrize("value", [0.1, 0.7, -1.3])
def test_whitening_does_not_blow_rounding_errors_up(value: float) -> None:
    """The mean of equal values is off by a rounding; the 1e-8 under the root keeps that from becoming an advantage of 1."""
    for steps in range(1, 200):
        tensor = torch.full((1, steps), value)
        assert whiten(tensor, everything(tensor)).abs().max() < 0.01


def test_whitening_an_empty_mask_gives_zeros_and_extreme_values_stay_finite() -> None:
    assert torch.equal(whiten(GRID, ~everything(GRID)), torch.zeros_like(GRID))
    assert float(masked_mean(GRID, ~everything(GRID))) == float(masked_var(GRID, ~everything(GRID))) == 0.0
    for values in ([[1e15, -1e15, 1e15]], [[1e-30, -1e-30]], [[1e-20, 1e15]]):
        assert whiten(torch.tensor(values), everything(torch.tensor(values))).isfinite().all()


def test_mean_and_variance_are_those_of_the_masked_values() -> None:
    values, mask = torch.tensor([[1.0, math.nan, 4.0], [7.0, math.inf, -1e9]]), torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    assert [float(function(values, mask)) for function in (masked_sum, masked_mean, masked_var)] == [12.0, 4.0, 6.0]


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, lambda x, mask: whiten(x, mask)[0, 0]])
def test_what_is_masked_gets_no_gradient_and_spoils_none(function: object) -> None:
    mask = torch.tensor([[True, False, True, False]])
    clean = torch.tensor([[1.0, 0.0, 4.0, 0.0]], requires_grad=True)
    poisoned = torch.tensor([[1.0, math.nan, 4.0, math.inf]], requires_grad=True)
    for values in (clean, poisoned):
        function(values, mask).backward()
    assert torch.equal(poisoned.grad, clean.grad)
    assert poisoned.grad[~mask].eq(0).all()


def test_explained_variance_of_known_critics() -> None:
    targets = torch.tensor([[1.0, 2.0, 3.0, 4.0, math.nan]])
    mask = torch.tensor([[True, True, True, True, False]])
    # A constant error is no unexplained variance.
    for values, expected in ((targets, 1), (targets + 5, 1), (0 * targets, 0), (targets / 2, 0.75), (-targets, -3)):
        assert float(explained_variance(values, targets, mask)) == pytest.approx(expected)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.7, -3.3, 1234.5])
@pytest.mark.parametrize("steps", [1, 3, 7, 100])
def test_explained_variance_of_equal_targets_is_zero(target: float, steps: int) -> None:
    """Their mean is off by a rounding, so their variance is only almost 0: dividing by it gave -1e13."""
    targets = torch.full((1, steps), target)
    predictions = torch.linspace(-1.0, 1.0, steps)[None]
    assert float(explained_variance(predictions, targets, everything(targets))) == 0.0

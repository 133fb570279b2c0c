"""KL estimators: their bias and spread in numbers, and which of them has the right gradient where."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from surefoot.core.kl import adapted_kl_coef, k1, k2, k3, kl_penalized_rewards
from surefoot.core.losses import LossSettings, ppo_loss

LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.5, 0.9, 0.2, -1.1, 0.4], dtype=torch.float64), dim=0)

Estimator = Callable[[Tensor, Tensor], Tensor]


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient with respect to the logits of `objective(log-probs of all five actions)`."""
    logits = LOGITS.clone().requires_grad_()
    objective(torch.log_softmax(logits, dim=0)).backward()
    return logits.grad


def in_reward(estimator: Estimator) -> Tensor:
    """Expected policy gradient of the estimate as a cost: E_p[k(a) ∇log p(a)], all actions enumerated."""
    return gradient_of(lambda logprobs: (logprobs.exp() * estimator(logprobs, REFERENCE)).detach().dot(logprobs))


def in_loss(estimator: Estimator) -> Tensor:
    """Expected gradient of the estimate as a loss on sampled actions: E_p[∇k(a)]."""
    return gradient_of(lambda logprobs: logprobs.exp().detach().dot(estimator(logprobs, REFERENCE)))


REVERSE_KL = gradient_of(lambda logprobs: logprobs.exp().dot(logprobs - REFERENCE))  # KL(p‖p_ref), exact
FORWARD_KL = gradient_of(lambda logprobs: REFERENCE.exp().dot(REFERENCE - logprobs))  # KL(p_ref‖p), exact
REFERENCE_SCORE = gradient_of(lambda logprobs: REFERENCE.exp().dot(logprobs))  # E_ref[∇log p]


def assert_near(gradient: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "mean", "bias", "spread"),
    [
        *[(k1, 0.1, 0.0, 20.0), (k2, 0.1, 0.0025, 1.42), (k3, 0.1, 0.0, 1.42)],
        *[(k1, 1.0, 0.0, 2.0), (k2, 1.0, 0.25, 1.73), (k3, 1.0, 0.0, 1.70)],
    ],
)
def test_bias_and_spread_are_those_of_two_gaussians(estimator: Estimator, mean: float, bias: float, spread: float) -> None:
    """N(0, 1) against N(mean, 1), as in Schulman's "Approximating KL divergence" (2020); both relative to the true KL."""
    x = torch.linspace(-12.0, 12.0, 200_001, dtype=torch.float64)
    logprobs, reference = (-0.5 * (x - m) ** 2 - 0.5 * math.log(2 * math.pi) for m in (0.0, mean))
    weights = logprobs.exp() * (x[1] - x[0])
    estimates = estimator(logprobs, reference)
    expected = float((weights * estimates).sum())
    variance = float((weights * (estimates - expected) ** 2).sum())
    true = mean**2 / 2
    assert expected / true - 1.0 == pytest.approx(bias, abs=1e-4)
    assert math.sqrt(variance) / true == pytest.approx(spread, abs=0.006)


def test_in_the_reward_k1_alone_has_the_gradient_of_the_kl() -> None:
    assert_near(in_reward(k1), REVERSE_KL)
    assert_near(in_reward(k3), REVERSE_KL + REFERENCE_SCORE)
    assert float((in_reward(k3) - REVERSE_KL).norm()) > 0.3
    assert float((in_reward(k2) - REVERSE_KL).norm()) > 0.1


def test_in_the_loss_k2_alone_has_the_gradient_of_the_kl() -> None:
    """k1 pulls nowhere, and k3 towards the forward KL."""
    assert_near(in_loss(k2), REVERSE_KL)
    assert_near(in_loss(k1), torch.zeros(5, dtype=torch.float64))
    assert_near(in_loss(k3), FORWARD_KL)
    assert float((FORWARD_KL - REVERSE_KL).norm()) > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.7], ids=["on policy", "after some steps"])
def test_the_kl_term_of_the_loss_has_the_gradient_of_the_kl(shift: float) -> None:
    """The five actions as five one-token rows, each counting what its old probability is: the expectation, no sample.

    The samples are the old policy's: without the ratio the gradient would be right before the first step alone.
    """
    old = torch.log_softmax(LOGITS + shift * torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]), dim=0)[:, None]
    zeros = torch.zeros(5, 1, dtype=torch.float64)

    def expected_loss(logprobs: Tensor) -> Tensor:
        return ppo_loss(
            (logprobs[:, None], zeros, zeros),
            (old, zeros, REFERENCE[:, None]),
            advantages_BT=zeros,
            returns_BT=zeros,
            mask_BT=torch.ones(5, 1, dtype=torch.bool),
            scale=old.exp(),
            settings=LossSettings(kl_coef=0.3),
        )[0]

    assert_near(gradient_of(expected_loss), 0.3 * REVERSE_KL)
    without_ratio = gradient_of(lambda logprobs: old[:, 0].exp().dot(k2(logprobs, REFERENCE)))
    assert (float((without_ratio - REVERSE_KL).norm()) > 0.1) == (shift > 0)


def test_penalty_is_charged_where_tokens_were_written_and_nowhere_else() -> None:
    rewards = torch.tensor([[9.0, 0.0, 0.5, math.nan]])
    logprobs = torch.tensor([[math.nan, -1.0, -0.5, -9.0]])
    reference = torch.tensor([[-3.0, -2.0, -0.25, math.inf]])
    mask = torch.tensor([[False, True, True, False]])
    penalized = kl_penalized_rewards(rewards, logprobs, reference, mask, coef=0.1)
    assert penalized.flatten().tolist() == pytest.approx([0.0, -0.1, 0.525, 0.0])


def test_k3_neither_overflows_nor_is_rounded_to_nothing() -> None:
    """exp(x) - 1 - x loses every digit in float32 for a small x."""
    extreme = k3(torch.tensor([-1e6, 0.0, -50.0]), torch.tensor([0.0, -1e6, 0.0]))
    assert extreme.isfinite().all() and (extreme >= 0).all()
    assert float(k3(torch.tensor(0.0), torch.tensor(1e-3))) == pytest.approx(5.0017e-7, rel=0.02)
    assert float(k3(torch.tensor(-1.25), torch.tensor(-1.25))) == 0.0


def test_adaptive_coefficient_moves_towards_the_target() -> None:
    assert adapted_kl_coef(0.15, 12.0, target=6.0, horizon=10_000, episodes=256) == pytest.approx(0.150768, abs=1e-9)

    def adapted(kl: float) -> float:
        return adapted_kl_coef(1.0, kl, target=6.0, horizon=1000, episodes=100)

    expected = {6.0: 1.0, 6.6: 1.01, 5.4: 0.99, 600.0: 1.02, -600.0: 0.98}  # 10 % too far: dearer; the error is clipped
    assert {kl: adapted(kl) for kl in expected} == pytest.approx(expected)

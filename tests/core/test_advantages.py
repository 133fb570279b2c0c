"""Generalised advantage estimation: literals, identities, and a token-by-token twin in plain Python."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.core.advantages import gae

NAN = math.nan


def one_row(
    rewards: list[float],
    values: list[float],
    *,
    mask: list[int] | None = None,
    bootstrap: float = 0.0,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one trajectory that ends at its last masked step."""
    mask = mask or [1] * len(rewards)
    last = max(t for t, on in enumerate(mask) if on)
    ends = torch.zeros(1, len(rewards), dtype=torch.bool)
    ends[0, last] = True
    advantages, returns = gae(
        torch.tensor([rewards]),
        torch.tensor([values]),
        mask_BT=torch.tensor([mask]).bool(),
        ends_BT=ends,
        bootstrap_BT=torch.where(ends, bootstrap, NAN),
        gamma=gamma,
        lam=lam,
    )
    return advantages[0], returns[0]


def twin(rewards: Any, values: Any, mask: Any, ends: Any, bootstrap: Any, *, gamma: float, lam: float) -> list[list[float]]:
    """The definition, forward: A_t = Σ_k (γλ)^k δ_{t+k} over the written steps that follow in the same trajectory."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    written = [t for t, on in enumerate(mask) if on]
    for start, first in enumerate(written):
        weight = 1.0
        for i in range(start, len(written)):
            t = written[i]
            following = bootstrap[t] if ends[t] else values[written[i + 1]]
            advantages[first] += weight * (rewards[t] + gamma * following - values[t])
            weight *= gamma * lam
            if ends[t]:
                break
        returns[first] = advantages[first] + values[first]
    return [advantages, returns]


@pytest.mark.parametrize(
    ("values", "gamma", "bootstrap", "expected"),
    [
        ([0.5, 0.5, 0.5], 1.0, 0.0, [0.45125, 0.475, 0.5]),
        ([0.5, 0.4, 0.3], 0.99, 0.0, [0.418307, 0.55535, 0.7]),
        ([0.5, 0.4, 0.3], 0.99, 0.3, [0.681015, 0.834678, 0.997]),  # cut off, not ended: the last value counts on
    ],
)
def test_gae_gives_the_numbers_worked_by_hand(values, gamma, bootstrap, expected):
    advantages, returns = one_row([0.0, 0.0, 1.0], values, gamma=gamma, bootstrap=bootstrap)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)], abs=1e-6)


def test_truncation_is_not_termination() -> None:
    """Reward 1 for ever, seen in pieces of 8: V = 1/(1-γ) is right only if a cut is not taken for an end."""
    gamma, steps = 0.9, 24
    ends = torch.zeros(1, steps, dtype=torch.bool)
    ends[0, 7::8] = True
    value = 1.0 / (1.0 - gamma)

    def advantages_with(bootstrap: float) -> Tensor:
        return gae(
            torch.ones(1, steps),
            torch.full((1, steps), value),
            mask_BT=torch.ones(1, steps, dtype=torch.bool),
            ends_BT=ends,
            bootstrap_BT=torch.full((1, steps), bootstrap),
            gamma=gamma,
            lam=0.95,
        )[0]

    torch.testing.assert_close(advantages_with(value), torch.zeros(1, steps), rtol=0, atol=1e-5)
    assert float(advantages_with(0.0)[0, 7]) == pytest.approx(1.0 - value, rel=1e-6)


def test_lambda_one_is_the_monte_carlo_return_minus_the_value_and_lambda_zero_the_one_step_error() -> None:
    rewards, values, gamma = [0.3, -0.2, 0.5, 1.0], [0.4, 0.1, -0.6, 0.2], 0.9
    advantages, returns = one_row(rewards, values, gamma=gamma, lam=1.0, bootstrap=0.7)
    for t in range(4):
        monte_carlo = sum(gamma**k * r for k, r in enumerate(rewards[t:])) + gamma ** (4 - t) * 0.7
        assert [float(advantages[t]), float(returns[t])] == pytest.approx([monte_carlo - values[t], monte_carlo], abs=1e-6)
    following = zip(rewards, values, [*values[1:], 0.7], strict=True)
    expected = [r + gamma * v_next - v for r, v, v_next in following]
    assert one_row(rewards, values, gamma=gamma, lam=0.0, bootstrap=0.7)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("lam", "expected"), [(0.95, 0.95**199), (1.0, 1.0)])
def test_lambda_decides_how_far_back_a_last_reward_is_seen(lam: float, expected: float) -> None:
    rewards = torch.zeros(1, 200)
    rewards[0, -1] = 1.0
    mask, zeros = torch.ones(1, 200, dtype=torch.bool), torch.zeros(1, 200)
    ends = {"mask_BT": mask, "ends_BT": rewards > 0, "bootstrap_BT": zeros}
    assert float(gae(rewards, zeros, **ends, gamma=1.0, lam=lam)[0][0, 0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("inserted", [1, 3, 17])
def test_inserting_masked_tokens_anywhere_leaves_every_bit_of_the_advantages(inserted: int) -> None:
    rewards, values = [0.1, 0.0, -0.3, 1.0], [0.2, 0.3, 0.5, 0.6]
    advantages, returns = one_row(rewards, values, gamma=0.99)
    for place in range(5):
        filler = [NAN] * inserted
        mask = [1] * place + [0] * inserted + [1] * (4 - place)
        longer = one_row(*(x[:place] + filler + x[place:] for x in (rewards, values)), mask=mask, gamma=0.99)
        assert torch.equal(longer[0][torch.tensor(mask).bool()], advantages)
        assert torch.equal(longer[1][torch.tensor(mask).bool()], returns)


def test_gae_equals_its_twin_on_a_thousand_ragged_batches() -> None:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    for _ in range(1000):
        rows, steps = int(uniform(1) * 4) + 1, int(uniform(1) * 12) + 1
        gamma, lam = (float(x) for x in (0.8 + 0.2 * uniform(2)))
        mask = uniform(rows, steps) < 0.6
        after = mask.flip(1).cumsum(1).flip(1) - mask.long()  # written steps still to come
        ends = mask & ((uniform(rows, steps) < 0.2) | (after == 0))
        rewards, values = (torch.where(mask, uniform(rows, steps) - 0.5, NAN) for _ in range(2))
        bootstrap = torch.where(ends, uniform(rows, steps) - 0.5, NAN)
        advantages, returns = gae(rewards, values, mask_BT=mask, ends_BT=ends, bootstrap_BT=bootstrap, gamma=gamma, lam=lam)
        for b in range(rows):
            row = (x[b].tolist() for x in (rewards, values, mask, ends, bootstrap))
            expected = twin(*row, gamma=gamma, lam=lam)
            assert [*advantages[b].tolist(), *returns[b].tolist()] == pytest.approx([*expected[0], *expected[1]], abs=1e-6)

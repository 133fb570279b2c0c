"""The PPO loss: literals worked by hand, and what must not change it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from surefoot.core.losses import LossSettings, LossStats, clipped_policy_loss, ppo_loss, truncated_ratio, value_loss

SETTINGS = LossSettings(clip_range=0.2, clip_range_vf=0.3, vf_coef=0.5, ent_coef=0.1)


def random_inputs(shape: tuple[int, int] = (3, 6), *, seed: int = 0) -> dict[str, Tensor]:
    """Old and new policy a little apart, so that some steps are clipped on either side; ragged answers as mask."""
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "values", "entropies", "old_logprobs", "old_values", "advantages", "returns")
    inputs = {name: torch.randn(shape, generator=generator) for name in names}
    inputs["old_logprobs"] = inputs["logprobs"] + 0.3 * inputs["old_logprobs"]
    inputs["mask"] = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()[: shape[0], : shape[1]]
    return inputs


def loss_of(
    inputs: dict[str, Tensor],
    *,
    denominator: float | None = None,
    settings: LossSettings = SETTINGS,
) -> tuple[Tensor, LossStats, list[Tensor]]:
    """Loss, statistics and the gradients of log-probs, values and entropies."""
    new = [inputs[name].clone().requires_grad_() for name in ("logprobs", "values", "entropies")]
    loss, stats = ppo_loss(
        (new[0], new[1], new[2]),
        tuple(inputs[name] for name in ("old_logprobs", "old_values", "reference") if name in inputs),
        advantages_BT=inputs["advantages"],
        returns_BT=inputs["returns"],
        mask_BT=inputs["mask"],
        denominator=inputs["mask"].sum() if denominator is None else denominator,
        settings=settings,
        weights_BT=inputs.get("weights"),
    )
    loss.backward()
    return loss.detach(), stats, [x.grad if x.grad is not None else torch.zeros_like(x) for x in new]


def stats_by_name(stats: LossStats) -> dict[str, float]:
    return {name: float(getattr(stats, name)) for name in (*LossStats.NAMES, "ratio_max")}


def assert_same_stats(stats: LossStats, expected: LossStats) -> None:
    for name, value in dataclasses.asdict(expected).items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # past the upper clip, and better: nothing more to gain
        (1.5, -1.0, 1.5, 1.5),  # past the upper clip, and worse: pushed back
        (0.5, 1.0, -0.5, -0.5),  # past the lower clip, and worse: pushed back
        (0.5, -1.0, 0.8, 0.0),  # past the lower clip, and better
        (1.1, 1.0, -1.1, -1.1),  # inside
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_clipped_surrogate_has_gradient_only_where_it_is_not_clipped(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    log_ratio = torch.tensor(math.log(ratio), requires_grad=True)
    per_step = clipped_policy_loss(log_ratio, torch.tensor(advantage), clip_range=0.2)
    per_step.backward()
    assert float(per_step.detach()) == pytest.approx(loss, abs=1e-6)
    assert float(log_ratio.grad) == pytest.approx(gradient, abs=1e-6)
    assert gradient != 0 or float(log_ratio.grad) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (4.0, -1.0, 3.0, 0.0),  # past c: no more than c |A|, and no pull
        (2.0, -1.0, 2.0, 2.0),  # past the clip, before c: as ever
        (4.0, 1.0, -1.2, 0.0),  # c is for worse steps alone
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_dual_clip_bounds_the_loss_of_a_worse_step(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio = torch.tensor(math.log(ratio))
    per_step = clipped_policy_loss(log_ratio, torch.tensor(advantage), clip_range=0.2, dual_clip=3.0)
    slope = loss_of(one_step(ratio, advantage), settings=LossSettings(clip_range=0.2, dual_clip=3.0))[2][0]
    assert float(per_step) == pytest.approx(loss, abs=1e-5)
    assert float(slope) == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 1.0, -1.25, -1.25),  # past 1 + ε, within 1 + ε_high: still pushed
        (1.5, 1.0, -1.28, 0.0),
        (0.5, -1.0, 0.8, 0.0),  # below nothing changes
    ],
)
def test_a_higher_upper_bound_leaves_the_lower_one(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio = torch.tensor(math.log(ratio))
    per_step = clipped_policy_loss(log_ratio, torch.tensor(advantage), clip_range=0.2, clip_range_high=0.28)
    slope = loss_of(one_step(ratio, advantage), settings=LossSettings(clip_range=0.2, clip_range_high=0.28))[2][0]
    assert float(per_step) == pytest.approx(loss, abs=1e-5)
    assert float(slope) == pytest.approx(gradient, abs=1e-5)


def one_step(ratio: float, advantage: float) -> dict[str, Tensor]:
    """A batch of one step with this ratio and advantage."""
    inputs = {name: torch.zeros(1, 1) for name in ("values", "entropies", "old_logprobs", "old_values", "returns")}
    numbers = {"logprobs": torch.tensor([[math.log(ratio)]]), "advantages": torch.tensor([[advantage]])}
    return inputs | numbers | {"mask": torch.ones(1, 1, dtype=torch.bool)}


def test_the_kl_term_is_half_the_square_weighted_by_the_ratio() -> None:
    """Ratio 1.5, log π - log π_ref = 0.5, β 0.1: value 0.1 · 1.5 · 0.125, and slope 0.1 · 1.5 · 0.5 besides -A ρ = 0."""
    inputs = one_step(1.5, 0.0) | {"reference": torch.tensor([[math.log(1.5) - 0.5]])}
    loss, _, gradients = loss_of(inputs, settings=LossSettings(kl_coef=0.1))
    assert float(loss) == pytest.approx(0.1 * 1.5 * 0.125, abs=1e-7)
    assert float(gradients[0]) == pytest.approx(0.1 * 1.5 * 0.5, abs=1e-7)


def test_a_sampler_ratio_is_cut_at_the_cap() -> None:
    trainer, sampler = torch.tensor([-1.0, -1.0, -1.0, 0.0]), torch.tensor([-1.0, -0.5, -2.5, -1e6])
    assert truncated_ratio(trainer, sampler, cap=2.0).tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0, 2.0])


def test_weights_count_in_every_term_and_in_no_statistic() -> None:
    """Weights of 0 and 2 over a denominator are the loss of the steps that have 2, counted twice."""
    settings = LossSettings(clip_range=0.2, vf_coef=0.5, ent_coef=0.1, kl_coef=0.3)
    inputs = random_inputs() | {"reference": torch.randn(3, 6, generator=torch.Generator().manual_seed(3))}
    kept = torch.rand(3, 6, generator=torch.Generator().manual_seed(4)) < 0.5
    weighted, stats, gradients = loss_of(inputs | {"weights": 2.0 * kept}, denominator=4, settings=settings)
    expected, _, expected_gradients = loss_of(inputs | {"mask": inputs["mask"] & kept}, denominator=2, settings=settings)
    torch.testing.assert_close(weighted, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)
    assert_same_stats(stats, loss_of(inputs, settings=settings)[1])


def test_written_out_gradients_are_those_of_autograd() -> None:
    """Every setting at once, against the formulas on plain tensors."""
    settings = LossSettings(0.2, 0.3, 0.5, 0.1, clip_range_high=0.4, dual_clip=1.5, kl_coef=0.3)
    inputs = random_inputs((2, 6), seed=2)
    inputs |= {name: torch.rand(2, 6, generator=torch.Generator().manual_seed(8)) for name in ("reference", "weights")}
    new = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "values", "entropies")}
    log_ratio = new["logprobs"] - inputs["old_logprobs"]
    steps = clipped_policy_loss(log_ratio, inputs["advantages"], clip_range=0.2, clip_range_high=0.4, dual_clip=1.5)
    steps = steps + 0.5 * value_loss(new["values"], inputs["old_values"], inputs["returns"], clip_range=0.3)
    steps = steps - 0.1 * new["entropies"] + 0.3 * log_ratio.exp().detach() * 0.5 * (new["logprobs"] - inputs["reference"]) ** 2
    expected = torch.where(inputs["mask"], inputs["weights"] * steps, 0.0).sum() / 7
    expected.backward()
    loss, _, gradients = loss_of(inputs, denominator=7, settings=settings)
    torch.testing.assert_close(loss, expected.detach())
    for gradient, tensor in zip(gradients, new.values(), strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


def test_ratio_never_overflows() -> None:
    log_ratio = torch.tensor([1e4, -1e4, 100.0], requires_grad=True)
    per_step = clipped_policy_loss(log_ratio, torch.tensor([-1.0, -1.0, 1.0]), clip_range=0.2)
    per_step.sum().backward()
    assert per_step.isfinite().all() and log_ratio.grad.isfinite().all()
    assert float(per_step[0].detach()) == pytest.approx(math.exp(20), rel=1e-5)


def test_value_clip_has_zero_gradient_far_from_the_return() -> None:
    value = torch.tensor(1.0, requires_grad=True)
    loss = value_loss(value, torch.tensor(0.0), torch.tensor(2.0), clip_range=0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.62)
    assert float(value.grad) == 0.0


def test_value_loss_is_half_the_square_when_not_clipped() -> None:
    value = torch.tensor(1.0, requires_grad=True)
    loss = value_loss(value, torch.tensor(0.0), torch.tensor(2.0), clip_range=None)
    loss.backward()
    assert float(loss.detach()) == 0.5
    assert float(value.grad) == -1.0


def test_value_clip_stays_out_of_the_way_inside_its_range() -> None:
    value = torch.tensor([0.1, -0.1], requires_grad=True)
    loss = value_loss(value, torch.zeros(2), torch.tensor([2.0, 2.0]), clip_range=0.2)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), 0.5 * (value.detach() - 2.0) ** 2)
    torch.testing.assert_close(value.grad, value.detach() - 2.0)


def test_whole_loss_is_the_sum_of_its_terms_over_the_denominator() -> None:
    """Two steps by hand: ratio 1.5 with A = -1, and ratio 1 with A = 2; values 1 and 0, returns 2 and 0."""
    inputs = {
        "logprobs": torch.tensor([[math.log(0.6), math.log(0.5)]]),
        "old_logprobs": torch.tensor([[math.log(0.4), math.log(0.5)]]),
        "values": torch.tensor([[1.0, 0.0]]),
        "old_values": torch.tensor([[0.0, 0.0]]),
        "entropies": torch.tensor([[0.7, 0.3]]),
        "advantages": torch.tensor([[-1.0, 2.0]]),
        "returns": torch.tensor([[2.0, 0.0]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    loss, stats, gradients = loss_of(inputs, settings=LossSettings(clip_range=0.2, vf_coef=0.1, ent_coef=0.01))
    assert float(loss) == pytest.approx(((1.5 - 2.0) + 0.1 * 0.5 - 0.01 * 1.0) / 2)
    expected = {
        "steps": 2,
        "policy_loss": -0.5,
        "value_loss": 0.5,
        "entropy": 1.0,
        "ratio": 2.5,
        "ratio_max": 1.5,
        "approx_kl": 0.5 - math.log(1.5),
        "clipped": 1,
        "value_clipped": 0,
    }
    assert {name: float(value) for name, value in stats_by_name(stats).items()} == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradients[0], torch.tensor([[1.5, -2.0]]) / 2)
    torch.testing.assert_close(gradients[1], 0.1 * torch.tensor([[-1.0, 0.0]]) / 2)
    torch.testing.assert_close(gradients[2], torch.tensor([[-0.01, -0.01]]) / 2)


def test_clip_fraction_of_the_value_counts_moves_from_the_old_value() -> None:
    inputs = random_inputs()
    inputs["values"] = inputs["old_values"] + torch.tensor([0.31, -0.31, 0.29, -0.29, 0.0, 5.0])
    assert int(loss_of(inputs)[1].value_clipped) == 3  # columns 0, 1 and 5 of the mask
    assert int(loss_of(inputs, settings=LossSettings(clip_range_vf=None))[1].value_clipped) == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e9, -1e9])
def test_what_is_masked_changes_neither_loss_nor_gradient_nor_statistics(poison: float) -> None:
    for seed in range(5):
        inputs = random_inputs(seed=seed)
        inputs |= {"reference": inputs["returns"] - 1.0, "weights": inputs["advantages"].abs()}
        settings = LossSettings(0.2, 0.3, 0.5, 0.1, clip_range_high=0.3, dual_clip=2.0, kl_coef=0.2)
        loss, stats, gradients = loss_of(inputs, settings=settings)
        poisoned = {name: x if name == "mask" else torch.where(inputs["mask"], x, poison) for name, x in inputs.items()}
        poisoned_loss, poisoned_stats, poisoned_gradients = loss_of(poisoned, settings=settings)
        assert torch.equal(poisoned_loss, loss)
        assert_same_stats(poisoned_stats, stats)
        for gradient, expected in zip(poisoned_gradients, gradients, strict=True):
            assert torch.equal(gradient, expected)
            assert gradient[~inputs["mask"]].eq(0).all()


def test_padding_changes_no_statistic() -> None:
    inputs = random_inputs()
    loss, stats, _ = loss_of(inputs)
    for left, right in ((0, 1), (0, 7), (5, 0), (3, 30)):
        padded = {name: torch.nn.functional.pad(x, (left, right)) for name, x in inputs.items()}
        padded_loss, padded_stats, _ = loss_of(padded)
        torch.testing.assert_close(padded_loss, loss, rtol=0, atol=1e-6)
        for name, value in dataclasses.asdict(stats).items():
            torch.testing.assert_close(getattr(padded_stats, name), value, rtol=1e-6, atol=1e-6)


def test_largest_ratio_is_not_that_of_the_padding() -> None:
    """Padding has ratio 1, more than a policy has that lowered every log-prob."""
    inputs = random_inputs()
    inputs["logprobs"] = inputs["old_logprobs"] - 0.5
    stats = loss_of(inputs)[1]
    assert float(stats.ratio_max) == pytest.approx(math.exp(-0.5))
    assert float(stats.ratio / stats.steps) == pytest.approx(math.exp(-0.5))


def test_micro_batches_add_up_to_the_minibatch() -> None:
    """With the minibatch's denominator: the mean of the parts' means would weigh ragged rows wrongly."""
    inputs = random_inputs()
    loss, stats, gradients = loss_of(inputs)
    parts = [
        loss_of({name: x[row : row + 1] for name, x in inputs.items()}, denominator=int(inputs["mask"].sum()))
        for row in range(3)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    total = parts[0][1] + parts[1][1] + parts[2][1]
    for name, value in dataclasses.asdict(stats).items():
        torch.testing.assert_close(getattr(total, name), value)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.cat([part[2][i] for part in parts]), gradient, rtol=0, atol=1e-7)


def test_loss_is_divided_by_the_denominator_given_and_nothing_else() -> None:
    inputs = random_inputs()
    loss, stats, gradients = loss_of(inputs, denominator=1)
    tenth, tenth_stats, tenth_gradients = loss_of(inputs, denominator=10)
    torch.testing.assert_close(tenth, loss / 10)
    torch.testing.assert_close(tenth_gradients[0], gradients[0] / 10)
    assert_same_stats(tenth_stats, stats)


def test_reported_kl_is_never_negative() -> None:
    """mean(old - new) of the same steps is: that estimator cannot be trusted to stop an epoch."""
    inputs = random_inputs()
    inputs["logprobs"] = inputs["old_logprobs"] + 0.1
    assert float((inputs["old_logprobs"] - inputs["logprobs"])[inputs["mask"]].mean()) < 0
    stats = loss_of(inputs)[1]
    assert float(stats.approx_kl / stats.steps) == pytest.approx(math.expm1(0.1) - 0.1, rel=1e-4)


def test_without_a_coefficient_entropy_has_no_say() -> None:
    inputs = random_inputs()
    plain, _, gradients = loss_of(inputs, settings=LossSettings(ent_coef=0.0))
    assert gradients[2].eq(0).all()
    inputs["entropies"] = inputs["entropies"] * 1e6
    assert torch.equal(loss_of(inputs, settings=LossSettings(ent_coef=0.0))[0], plain)


def test_entropy_bonus_raises_entropy() -> None:
    inputs = random_inputs()
    gradient = loss_of(inputs, settings=LossSettings(ent_coef=0.1))[2][2]
    assert (gradient[inputs["mask"]] < 0).all()

"""The PPO loss: literals worked by hand, and what must not change it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from surefoot.core.losses import LossSettings, PPOStats, nll_loss, ppo_loss, truncated_ratio

SETTINGS = LossSettings(clip_range=0.2, clip_range_vf=0.3, vf_coef=0.5, ent_coef=0.1)
EVERYTHING = LossSettings(0.2, 0.3, 0.5, 0.1, clip_range_high=0.4, dual_clip=1.5, kl_coef=0.3)
DUAL, HIGHER = LossSettings(dual_clip=3.0), LossSettings(clip_range_high=0.28)


def random_inputs(shape: tuple[int, int] = (3, 6), *, seed: int = 0) -> dict[str, Tensor]:
    """Old and new policy a little apart, so that some steps are clipped on either side; ragged completions as mask."""
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "values", "entropies", "old_logprobs", "old_values", "advantages", "returns")
    inputs = {name: torch.randn(shape, generator=generator) for name in names}
    inputs["old_logprobs"] = inputs["logprobs"] + 0.3 * inputs["old_logprobs"]
    inputs["mask"] = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()[: shape[0], : shape[1]]
    return inputs


def one_step(ratio: float = 1.0, advantage: float = 0.0, **others: float) -> dict[str, Tensor]:
    """A batch of one step with this ratio and advantage."""
    names = ("values", "entropies", "old_logprobs", "old_values", "returns")
    numbers = dict.fromkeys(names, 0.0) | {"logprobs": math.log(ratio), "advantages": advantage} | others
    return {name: torch.tensor([[number]]) for name, number in numbers.items()} | {"mask": torch.ones(1, 1).bool()}


def loss_of(
    inputs: dict[str, Tensor], *, denominator: float | None = None, settings: LossSettings = SETTINGS
) -> tuple[Tensor, PPOStats, list[Tensor]]:
    """Loss, sums and the gradients of log-probs, values and entropies."""
    new = [inputs[name].clone().requires_grad_() for name in ("logprobs", "values", "entropies")]
    loss, stats = ppo_loss(
        (new[0], new[1], new[2]),
        tuple(inputs[name] for name in ("old_logprobs", "old_values", "reference") if name in inputs),
        advantages_BT=inputs["advantages"],
        returns_BT=inputs["returns"],
        mask_BT=inputs["mask"],
        scale=inputs.get("weights", 1.0) / (int(inputs["mask"].sum()) if denominator is None else denominator),
        settings=settings,
    )
    loss.backward()
    return loss.detach(), stats, [x.grad if x.grad is not None else torch.zeros_like(x) for x in new]


def assert_near(stats: PPOStats, expected: PPOStats, tolerance: float = 0.0) -> None:
    for name, value in vars(expected).items():
        found = getattr(stats, name)
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("settings", "ratio", "advantage", "loss", "gradient"),
    [
        (LossSettings(), 1.5, 1.0, -1.2, 0.0),  # past the upper clip, and better: nothing more to gain
        (LossSettings(), 1.5, -1.0, 1.5, 1.5),  # past the upper clip, and worse: pushed back
        (LossSettings(), 0.5, 1.0, -0.5, -0.5),  # past the lower clip, and worse: pushed back
        (LossSettings(), 0.5, -1.0, 0.8, 0.0),  # past the lower clip, and better
        (LossSettings(), 1.1, 1.0, -1.1, -1.1),  # inside
        (LossSettings(), 0.9, -1.0, 0.9, 0.9),
        (DUAL, 4.0, -1.0, 3.0, 0.0),  # past c: no more than c |A|, and no pull
        (DUAL, 2.0, -1.0, 2.0, 2.0),  # past the clip, before c: as ever
        (DUAL, 4.0, 1.0, -1.2, 0.0),  # c is for worse steps alone
        (DUAL, 0.5, -1.0, 0.8, 0.0),
        (HIGHER, 1.25, 1.0, -1.25, -1.25),  # past 1 + ε, within 1 + ε_high: still pushed
        (HIGHER, 1.5, 1.0, -1.28, 0.0),
        (HIGHER, 0.5, -1.0, 0.8, 0.0),  # below nothing changes
    ],
)
def test_clipped_surrogate_has_gradient_only_where_it_is_not_clipped(settings, ratio, advantage, loss, gradient):
    _, stats, (slope, *_) = loss_of(one_step(ratio, advantage), settings=settings)
    assert float(stats.policy_loss) == pytest.approx(loss, abs=1e-6)
    assert float(slope) == pytest.approx(gradient, abs=1e-6) and (gradient != 0 or float(slope) == 0.0)


@pytest.mark.parametrize(
    ("settings", "advantages", "loss", "gradient"),
    [
        # Ratios 2 and ½: the sequence's is 1 for both, so each token moves both by half.
        (LossSettings(sequence_ratio=True), (1.0, 1.0), -2.0, (-1.0, -1.0)),
        (LossSettings(sequence_ratio=True), (1.0, -3.0), 2.0, (1.0, 1.0)),
        # CISPO: weights 1.28 and ½ on the log-probs -1 and -2, and the gradient is the weight's alone.
        (LossSettings(cispo=True, clip_range_high=0.28), (1.0, 1.0), 1.28 + 1.0, (-1.28, -0.5)),
        (LossSettings(cispo=True, clip_range_high=0.28), (-1.0, 1.0), -1.28 + 1.0, (1.28, -0.5)),
        (LossSettings(cispo=True, sequence_ratio=True), (1.0, -3.0), 1.0 - 6.0, (-1.0, 3.0)),
    ],
)
def test_sequence_ratio_and_cispo_give_the_numbers_worked_by_hand(settings, advantages, loss, gradient):
    numbers = {"logprobs": (-1.0, -2.0), "advantages": advantages, "old_logprobs": (-1 - math.log(2), -2 + math.log(2))}
    numbers |= dict.fromkeys(("values", "entropies", "old_values", "returns"), (0.0, 0.0))
    inputs = {name: torch.tensor([[*pair, 9.0]]) for name, pair in numbers.items()}
    inputs["mask"] = torch.tensor([[True, True, False]])
    _, stats, (slope, *_) = loss_of(inputs, denominator=1, settings=settings)
    assert float(stats.policy_loss) == pytest.approx(loss, abs=1e-6)
    assert slope[0].tolist() == pytest.approx([*gradient, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("clip_range", "value", "target", "loss", "gradient"),
    [
        (0.2, 1.0, 2.0, 1.62, 0.0),  # far from the old value: ½ (0.2 - 2)²
        (None, 1.0, 2.0, 0.5, -1.0),
        (0.2, 0.1, 2.0, 1.805, -1.9),  # inside: as if there were no clip
        (0.2, -0.1, 2.0, 2.205, -2.1),
    ],
)
def test_value_clip_has_zero_gradient_far_from_the_return(clip_range, value, target, loss, gradient):
    settings = LossSettings(clip_range_vf=clip_range, vf_coef=1.0)
    _, stats, (_, slope, _) = loss_of(one_step(values=value, returns=target), settings=settings)
    assert float(stats.value_loss) == pytest.approx(loss) and float(slope) == pytest.approx(gradient)


def test_a_sampler_ratio_is_cut_at_the_cap() -> None:
    trainer, sampler = torch.tensor([-1.0, -1.0, -1.0, 0.0]), torch.tensor([-1.0, -0.5, -2.5, -1e6])
    assert truncated_ratio(trainer, sampler, cap=2.0).tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0, 2.0])


def test_weights_count_in_every_term_and_in_no_statistic() -> None:
    """Weights of 0 and 2 over a denominator are the loss of the steps that have 2, counted twice."""
    inputs = random_inputs() | {"reference": torch.randn(3, 6, generator=torch.Generator().manual_seed(3))}
    kept = torch.rand(3, 6, generator=torch.Generator().manual_seed(4)) < 0.5
    weighted, stats, gradients = loss_of(inputs | {"weights": 2.0 * kept}, denominator=4, settings=EVERYTHING)
    expected, _, expected_gradients = loss_of(inputs | {"mask": inputs["mask"] & kept}, denominator=2, settings=EVERYTHING)
    torch.testing.assert_close(weighted, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert_near(stats, loss_of(inputs, settings=EVERYTHING)[1])


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of the loss that is returned, with every setting at once: where no branch changes within the difference."""
    inputs = {name: x.double() if name != "mask" else x for name, x in random_inputs((2, 6), seed=2).items()}
    inputs |= {name: torch.rand(2, 6, generator=torch.Generator().manual_seed(8)).double() for name in ("reference", "weights")}
    without_kl = replace(EVERYTHING, kl_coef=0.0)  # whose ratio has no gradient
    _, _, gradients = loss_of(inputs, denominator=7, settings=without_kl)
    for name, gradient in zip(("logprobs", "values", "entropies"), gradients, strict=True):
        for place in inputs["mask"].nonzero().tolist():
            off = torch.zeros(2, 6, dtype=torch.float64)
            off[tuple(place)] = 1e-6
            ends = [loss_of(inputs | {name: inputs[name] + s * off}, denominator=7, settings=without_kl)[0] for s in (1, -1)]
            assert float(gradient[tuple(place)]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize(("log_ratio", "advantage", "loss"), [(1e4, -1.0, math.exp(20)), (-1e4, -1.0, 0.8), (100.0, 1.0, -1.2)])
def test_ratio_never_overflows(log_ratio: float, advantage: float, loss: float) -> None:
    _, stats, gradients = loss_of(one_step(advantage=advantage, logprobs=log_ratio))
    assert float(stats.policy_loss) == pytest.approx(loss, rel=1e-5) and gradients[0].isfinite().all()


def test_whole_loss_is_the_sum_of_its_terms_over_the_denominator() -> None:
    """Two steps by hand: ratio 1.5 with A = -1, and ratio 1 with A = 2; values 1 and 0, returns 2 and 0."""
    numbers = {"values": [1.0, 0.0], "old_values": [0.0, 0.0], "entropies": [0.7, 0.3], "returns": [2.0, 0.0]}
    numbers |= {"logprobs": [math.log(0.6), math.log(0.5)], "old_logprobs": [math.log(0.4), math.log(0.5)]}
    inputs = {name: torch.tensor([pair]) for name, pair in (numbers | {"advantages": [-1.0, 2.0]}).items()}
    inputs["mask"] = torch.ones(1, 2, dtype=torch.bool)
    loss, stats, gradients = loss_of(inputs, settings=LossSettings(clip_range=0.2, vf_coef=0.1, ent_coef=0.01))
    assert float(loss) == pytest.approx(((1.5 - 2.0) + 0.1 * 0.5 - 0.01 * 1.0) / 2)
    expected = PPOStats(-0.5, 0.5, 1.0, 2.5, 0.5 - math.log(1.5), 1, 0, 2, 1.5)
    assert {name: float(value) for name, value in vars(stats).items()} == pytest.approx(vars(expected), abs=1e-6)
    expected_gradients = ([1.5, -2.0], [-0.1, 0.0], [-0.01, -0.01])
    torch.testing.assert_close(gradients, [torch.tensor([gradient]) / 2 for gradient in expected_gradients])


def test_clip_fraction_of_the_value_counts_moves_from_the_old_value() -> None:
    inputs = random_inputs()
    inputs["values"] = inputs["old_values"] + torch.tensor([0.31, -0.31, 0.29, -0.29, 0.0, 5.0])
    assert int(loss_of(inputs)[1].value_clipped) == 3  # columns 0, 1 and 5 of the mask
    assert int(loss_of(inputs, settings=LossSettings(clip_range_vf=None))[1].value_clipped) == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e9, -1e9])
def test_what_is_masked_changes_neither_loss_nor_gradient_nor_statistics(poison: float) -> None:
    for seed in range(5):
        inputs = random_inputs(seed=seed)
        inputs |= {"reference": inputs["returns"] - 1.0, "weights": inputs["mask"] * inputs["advantages"].abs()}
        loss, stats, gradients = loss_of(inputs, settings=EVERYTHING)
        kept = {"mask": inputs["mask"], "weights": inputs["weights"]}
        poisoned = {name: torch.where(inputs["mask"], x, poison) for name, x in inputs.items()} | kept
        poisoned_loss, poisoned_stats, poisoned_gradients = loss_of(poisoned, settings=EVERYTHING)
        assert torch.equal(poisoned_loss, loss)
        assert_near(poisoned_stats, stats)
        for gradient, expected in zip(poisoned_gradients, gradients, strict=True):
            assert torch.equal(gradient, expected) and gradient[~inputs["mask"]].eq(0).all()


def test_largest_ratio_is_not_that_of_the_padding() -> None:
    """Padding has ratio 1, more than a policy has that lowered every log-prob."""
    inputs = random_inputs()
    stats = loss_of(inputs | {"logprobs": inputs["old_logprobs"] - 0.5})[1]
    assert float(stats.ratio_max) == pytest.approx(math.exp(-0.5)) == float(stats.ratio / stats.num_tokens)


def test_reported_kl_is_never_negative() -> None:
    """mean(old - new) of the same steps is: that estimator cannot be trusted to stop an epoch."""
    inputs = random_inputs()
    inputs["logprobs"] = inputs["old_logprobs"] + 0.1
    assert float((inputs["old_logprobs"] - inputs["logprobs"])[inputs["mask"]].mean()) < 0
    stats = loss_of(inputs)[1]
    assert float(stats.approx_kl / stats.num_tokens) == pytest.approx(math.expm1(0.1) - 0.1, rel=1e-4)


def test_entropy_bonus_raises_entropy_and_without_a_coefficient_it_has_no_say() -> None:
    inputs = random_inputs()
    assert (loss_of(inputs)[2][2][inputs["mask"]] < 0).all()
    plain, _, gradients = loss_of(inputs, settings=LossSettings())
    assert gradients[2].eq(0).all()
    assert torch.equal(loss_of(inputs | {"entropies": inputs["entropies"] * 1e6}, settings=LossSettings())[0], plain)


def test_what_is_masked_is_inert_for_the_log_likelihood() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0]], requires_grad=True)
    poisoned = torch.where(mask, logprobs, math.nan).detach().requires_grad_()
    for values in (logprobs, poisoned):
        loss, stats = nll_loss(values, torch.where(mask, 0.5, math.nan), mask)
        assert float(loss.detach()) == pytest.approx(5.5)
        assert torch.equal(torch.autograd.grad(loss, values)[0], torch.where(mask, -1.0, 0.0))
        assert [float(value) for value in vars(stats).values()] == [5.5, 3.0, 1.5, 0, 0, 0]

"""Gates: what a healthy policy's own samples cannot show stops the run."""

import pytest
import torch

from surefoot.core.losses import PPOStats
from surefoot.errors import GateError
from surefoot.train.gates import check_first_minibatch, check_kl_sign, is_surely_negative
from tests.golden import refused


def stats(*, ratio: float = 1.0, ratio_max: float = 1.0, kl: float = 0.0, clipped: float = 0.0, loss: float = 0.0) -> PPOStats:
    """Means of a minibatch of 400 tokens, as the sums that travel."""
    return PPOStats(*(400 * torch.tensor([loss, 0.0, 0.0, ratio, kl, clipped, 0.0, 1.0]).double()), ratio_max)


def test_old_and_new_policy_being_one_passes() -> None:
    check_first_minibatch(stats(), exact=True)
    check_first_minibatch(stats(ratio=1 + 5e-7, ratio_max=1 + 2e-5, kl=9e-12), exact=True)  # seen on SmolLM2 in float32
    check_first_minibatch(stats(ratio=1.004, ratio_max=1.2, kl=1e-3), exact=False)  # seen with fused kernels in bfloat16


@pytest.mark.parametrize(
    ("exact", "wrong"),
    [(True, wrong) for wrong in ({"ratio": 1 + 1e-4}, {"ratio_max": 1.001}, {"kl": 1e-8}, {"clipped": 0.01})]
    + [(False, wrong) for wrong in ({"ratio": 1.05}, {"ratio_max": 2.0}, {"kl": 0.05}, {"clipped": 0.1})],
    ids=str,
)
def test_a_small_difference_in_float32_or_a_bug_in_bfloat16_stops_the_run(exact: bool, wrong: dict[str, float]) -> None:
    with refused(*([] if exact else ["policy.dtype"]), error=GateError):
        check_first_minibatch(stats(**wrong), exact=exact)


def test_a_loss_that_is_not_finite_is_left_to_the_update_that_skips_it() -> None:
    check_first_minibatch(stats(loss=float("nan"), ratio=float("nan")), exact=True)


def test_a_kl_is_surely_negative_only_beyond_three_standard_errors() -> None:
    spread = [-1.0, 1.0] * 50  # standard error 0.1005
    for shift, is_negative in ((0.0, False), (-0.29, False), (-0.31, True), (5.0, False)):
        assert is_surely_negative([kl + shift for kl in spread]) == is_negative
    assert not is_surely_negative([0.0] * 64) and not is_surely_negative([-5.0])  # a fresh adapter; one episode


def test_three_negative_kls_in_a_row_stop_the_run() -> None:
    check_kl_sign(2)
    with refused("3 updates", error=GateError):
        check_kl_sign(3)

"""Checks a run makes on itself. Failing, it stops with the likely causes."""

import statistics
from collections.abc import Sequence

from surefoot.core.losses import PPOStats
from surefoot.errors import GateError

# Updates in a row with a KL that is surely negative before the run stops.
NEGATIVE_KL_LIMIT = 3


def is_surely_negative(kls: Sequence[float]) -> bool:
    """Whether the mean of the episodes' KL estimates is more than three standard errors below 0.

    The estimates may be negative, their expectation may not: KL(p‖p_ref) ≥ 0 if the samples are p's.
    """
    if len(kls) < 2:
        return False
    mean = statistics.fmean(kls)
    return mean < 0.0 and mean < -3.0 * statistics.stdev(kls, mean) / len(kls) ** 0.5


def check_kl_sign(negative_in_a_row: int) -> None:
    """Raise GateError once the KL to the reference was surely negative for three updates in a row."""
    if negative_in_a_row >= NEGATIVE_KL_LIMIT:
        raise GateError(
            f"the KL to the reference has been surely negative for {negative_in_a_row} updates, which no "
            "policy's own samples give: the log-probs are not those of the distribution sampled from. Likely "
            "causes: sampler and trainer differ (temperature, a truncated distribution, dropout); a "
            "reference that is quantized or not the model the adapter started from."
        )


def check_first_minibatch(stats: PPOStats, *, exact: bool, clip_range: float = 0.2) -> None:
    """Before the first step of a run old and new policy are one: ratio 1, KL(old‖new) 0, nothing clipped.

    `exact` is float32, where old log-probs come from the sampler: a key/value cache and a full pass sum in
    different orders. In bfloat16 fused attention kernels round by row length: a standard deviation of 0.05 a
    token, of which four are allowed; more than a narrow `clip_range` (GSPO's) is. Raises GateError otherwise.
    """
    if not stats.is_finite:
        return  # the update skips such a step and counts it
    tokens = float(stats.num_tokens)
    ratio, clipped = float(stats.ratio) / tokens, float(stats.clipped) / tokens
    approx_kl, ratio_max = float(stats.approx_kl) / tokens, float(stats.ratio_max)
    if exact:
        passed = abs(ratio - 1) < 1e-5 and abs(ratio_max - 1) < 1e-4 and approx_kl < 1e-10 and clipped == 0
    else:
        bound = 1e-3 + 0.2 / tokens**0.5  # the second is what independent rounding averages to
        passed = abs(ratio - 1) < bound and abs(ratio_max - 1) < 0.5 and approx_kl < 5e-3
        passed &= clipped < 0.01 or clip_range < 0.05
    if not passed:
        hint = "; a low-precision kernel that depends on the batch (try policy.dtype: float32)"
        raise GateError(
            "the policy that is trained is not the one that wrote the samples: before any step the ratio "
            f"is {ratio:.7f} (largest {ratio_max:.5f}), KL(old‖new) {approx_kl:.2e}, clip fraction "
            f"{clipped:.3f}; they must be 1, 0 and 0. Likely causes: dropout or another random layer on; "
            "a temperature on one side only; a model whose positions or attention depend on padding; weights "
            f"changed between rollout and update{'' if exact else hint}."
        )

"""Schedules: a multiplier in [0, 1] as a function of progress."""

from __future__ import annotations

import math

KINDS = ("constant", "linear", "cosine")


def schedule(kind: str, progress: float, *, warmup: float = 0.0) -> float:
    """Multiplier for `progress` in [0, 1] of the run; the first `warmup` fraction climbs linearly from 0 to 1.

    `constant` stays at 1, `linear` falls to 0, `cosine` falls to 0 along half a cosine. Raises ValueError for
    another `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(KINDS)}")
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    done = min(max(done, 0.0), 1.0)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0

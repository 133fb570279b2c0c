"""Schedules: a multiplier in [0, 1] for each update of a run."""

import math

KINDS = ("constant", "linear", "cosine")


def schedule(kind: str, step: int, total_steps: int, *, warmup: float = 0.0) -> float:
    """Multiplier for update `step` (0, 1, … `total_steps` - 1).

    The first `warmup` fraction of the steps climbs linearly and reaches 1 with its last one. After it
    `constant` stays at 1; `linear` falls from 1 by equal amounts, `cosine` along half a cosine, both towards
    0 at `total_steps`. Raises ValueError for another `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(KINDS)}")
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0

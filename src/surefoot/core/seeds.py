"""Seeds for independent consumers of randomness."""

import hashlib


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one consumer: a counter, no generator to replay, so resuming needs no state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

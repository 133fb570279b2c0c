"""Steps per second end to end beside Stable-Baselines3: same settings, each run in a separate process, in turns.

    python benchmarks/speed/peer_sb3.py --sb3-python peers/bin/python [--rounds 3] [--cases cartpole pong]

The other environment needs stable-baselines3 (and ale-py, opencv-python-headless for pong). Prints medians, the ratio pair
by pair, and peak memory. Surefoot writes its run folder, metrics and checkpoints meanwhile, as it always does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("control_worker.py")
# Case -> the ways Surefoot runs it.
WAYS = {
    "cartpole": (["sync"], ["native"]),
    "cartpole-defaults": (["sync"], ["native"]),
    "pong": (["auto"], ["float32"]),
}


def measure(python: str, library: str, case: str, options: list[str]) -> dict[str, float]:
    command = [python, "-W", "ignore", str(WORKER), library, case, *options]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sb3-python", required=True, help="Python of an environment with stable-baselines3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    options = parser.parse_args()
    print(
        "| case | surefoot, steps/s | sb3, steps/s | ratio (min, max) | peak MiB, surefoot / sb3 |\n|---|---|---|---|---|"
    )
    for case in options.cases:
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            rows.setdefault("sb3", []).append(measure(options.sb3_python, "sb3", case, []))
            for way in WAYS[case]:
                rows.setdefault(" ".join(way), []).append(measure(sys.executable, "surefoot", case, way))
        peer = rows.pop("sb3")
        for way, ours in rows.items():
            ratios = [
                own["steps_per_s"] / other["steps_per_s"] for own, other in zip(ours, peer, strict=True)
            ]
            speed = [statistics.median(row["steps_per_s"] for row in side) for side in (ours, peer)]
            memory = [max(row["peak_mib"] for row in side) for side in (ours, peer)]
            print(
                f"| {case} {way} | {speed[0]:,.0f} | {speed[1]:,.0f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}, {max(ratios):.2f}) | {memory[0]:.0f} / {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

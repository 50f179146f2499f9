"""Pools that grow and shrink again and again under streams, and what is left after each cycle: `make soak`.

Ends with 1 where an answer differs, one fails, or something grows: processes, descriptors, segments of shared
memory or sockets beyond what the first cycles left, or the workers' memory by more than a tenth. Alone:

    python -m tests.on_ray.scaling_soak --cycles 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from model.synthetic import make_checkpoint
from tests.on_ray.scaling_story import left, undisturbed_and_with
from tests.on_ray.served import Served, soaking

NUM_CLIENTS = 12
MAX_TOKENS = 80
WARM_CYCLES = 3  # caches fill, Ray keeps processes at hand
COUNTED = ("processes", "worker_descriptors", "worker_segments", "sockets")
SPARE_PROCESSES = 4  # that Ray keeps at hand, more or fewer
GROWTH_MAX = 1.1  # of the bytes of the workers that stay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.cycles <= WARM_CYCLES:
        parser.error(f"--cycles: {arguments.cycles}; accepted: more than {WARM_CYCLES}")
    with soaking() as folder:
        make_checkpoint("tiny", folder / "tiny", seed=11)
        with Served(folder / "tiny", "--expert-workers", "1", log=folder / "log") as cluster:
            return soak(cluster, arguments.cycles)


def soak(cluster: Served, cycles: int) -> int:
    """The exit code."""
    warm: dict[str, int] = {}
    for cycle in range(1, cycles + 1):
        calm, scaled = asyncio.run(
            undisturbed_and_with(cluster, [(2, 3), (1, 1)], num_clients=NUM_CLIENTS, max_tokens=MAX_TOKENS)
        )
        is_left = left(cluster)
        told = {
            "cycle": cycle, "answers": scaled.answers, "different": len(scaled.different),
            "longest_gap_s": round(scaled.longest_gap_s, 3), "undisturbed_gap_s": round(calm.longest_gap_s, 3),
            **is_left,
        }  # fmt: skip
        print(json.dumps(told), flush=True)
        if scaled.different:
            return 1
        if cycle <= WARM_CYCLES:
            warm = {name: max(count, warm.get(name, 0)) for name, count in is_left.items()}
    return _growth(warm, is_left)


def _growth(warm: dict[str, int], is_left: dict[str, int]) -> int:
    spare = {"processes": SPARE_PROCESSES}
    grown = [name for name in COUNTED if is_left[name] > warm[name] + spare.get(name, 0)]
    if is_left["worker_bytes"] > GROWTH_MAX * warm["worker_bytes"]:
        grown.append("worker_bytes")
    for name in grown:
        print(f"{name} grew from {warm[name]} to {is_left[name]}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

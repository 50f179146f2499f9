"""Ten thousand seeds, two random histories of the scheduler from each: `make soak`.

Prints seeds and counts. A history that breaks a promise ends it with its seed, with which it can be run alone:
`python -m tests.unit.scheduler_soak --first SEED --count 1`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.unit import test_scheduler_model as short
from tests.unit.test_scheduler_properties import assert_all_has_ended, run


def main() -> int:
    parser = argparse.ArgumentParser("scheduler_soak")
    parser.add_argument("--first", type=int, default=1_000)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--moves", type=int, default=120)
    options = parser.parse_args()
    began_s, counters = time.monotonic(), Counter[str]()
    for seed in range(options.first, options.first + options.count):
        try:
            world = run(seed, options.moves)
            counters.update(world.scheduler.counters)
            assert_all_has_ended(world)
            small = short.history(seed, options.moves // 3)
            counters.update(small.scheduler.counters)
            short.assert_all_ends(small)
        except Exception:
            print(f"seed {seed} broke a promise after {options.moves} moves", file=sys.stderr, flush=True)
            raise
        done = seed - options.first + 1
        if done % 1000 == 0 or done == options.count:
            print(f"{done} of {options.count} histories, {time.monotonic() - began_s:.0f} s", flush=True)
    last = options.first + options.count - 1
    print(f"seeds {options.first} to {last}, {options.moves} moves each: every promise held")
    print(", ".join(f"{name} {count}" for name, count in sorted(counters.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

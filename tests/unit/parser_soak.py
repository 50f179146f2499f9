"""Two thousand conversations, each cut at every token, token by token, and in a hundred random ways: `make soak`.

One that reads differently ends it with its seed, with which it can be run alone:
`python -m tests.unit.parser_soak --first SEED --count 1`.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.unit.test_parser_cuts import assert_cuts_change_nothing


def main() -> int:
    parser = argparse.ArgumentParser("parser_soak")
    parser.add_argument("--first", type=int, default=1_000)
    parser.add_argument("--count", type=int, default=2_000)
    options = parser.parse_args()
    began_s, num_tokens, num_ways = time.monotonic(), 0, 0
    for seed in range(options.first, options.first + options.count):
        tokens, ways = assert_cuts_change_nothing(seed)
        num_tokens, num_ways = num_tokens + tokens, num_ways + ways
        done = seed - options.first + 1
        if done % 200 == 0 or done == options.count:
            elapsed_s = time.monotonic() - began_s
            print(
                f"{done} conversations, {num_tokens} tokens, cut in {num_ways} ways, {elapsed_s:.0f} s", flush=True
            )
    print(f"seeds {options.first} to {options.first + options.count - 1}: no cut changed what was said")
    return 0


if __name__ == "__main__":
    sys.exit(main())

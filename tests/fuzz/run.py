"""`python -m tests.fuzz.run [--cases N] [--seed S] [TARGET ...]`: coverage-guided fuzzing, a process per target.

Prints a line for each target: cases, coverage, the largest case in memory, and how it ended. A case that fails is
kept in the current folder as crash-<hash>; give that file's bytes to the target to see it again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

CASE_S_MAX = 5  # a case that takes longer hangs
LENGTH_MAX = 4200  # bytes of one case: a little more than a hello may have
RSS_MB_MAX = 2048  # of the whole process, torch included


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--cases", type=int, default=200_000, help="of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    args, of_fuzzer = parser.parse_known_args()
    if args.within:
        return _fuzz(args.targets[0], [*of_fuzzer, *args.targets[1:]])
    from tests.fuzz.targets import TARGETS

    if args.cases < 1:
        parser.error(f"--cases: {args.cases}; must be at least 1")
    unknown = set(args.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"targets: {', '.join(sorted(unknown))}; must be of {', '.join(TARGETS)}")
    return max(_run(name, args.cases, args.seed, TARGETS[name].seeds) for name in args.targets or TARGETS)


def _run(name: str, cases: int, seed: int, seeds: tuple[bytes, ...]) -> int:
    with tempfile.TemporaryDirectory() as corpus:
        for number, words in enumerate(seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(words)
        command = [sys.executable, "-m", "tests.fuzz.run", "--within", name, corpus, f"-runs={cases}",
                   f"-seed={seed}", f"-timeout={CASE_S_MAX}", f"-max_len={LENGTH_MAX}",
                   f"-rss_limit_mb={RSS_MB_MAX}", "-print_final_stats=1"]  # fmt: skip
        ended = subprocess.run(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    done = re.findall(r"number_of_executed_units: (\d+)", ended.stdout)
    covered = re.findall(r"cov: (\d+) ft: (\d+)", ended.stdout)
    memory = re.findall(r"largest case: (\d+)", ended.stdout)
    rss = re.findall(r"peak_rss_mb:\s+(\d+)", ended.stdout)
    number = int(done[-1]) if done else 0
    good = ended.returncode == 0 and number >= cases
    edges, features = covered[-1] if covered else ("?", "?")
    print(
        f"{name}: {number} cases from seed {seed}, {edges} edges and {features} features covered, largest case "
        f"{memory[-1] if memory else '?'} bytes, peak {rss[-1] if rss else '?'} MB: {'ok' if good else 'FAILED'}",
        flush=True,
    )
    if not good:
        print(ended.stdout[-8000:])
    return 0 if good else 1


def _fuzz(name: str, of_fuzzer: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["router.transport", "gateway"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    target.run(target.seeds[0])  # what it opens once is no case's
    largest = 0

    def one(data: bytes) -> None:
        nonlocal largest
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        target.run(data)
        _, peak = tracemalloc.get_traced_memory()
        if peak - before > largest:
            largest = peak - before
            print(f"largest case: {largest}", flush=True)
        assert peak - before <= target.memory_max, f"{peak - before} bytes; at most {target.memory_max}"

    tracemalloc.start()
    atheris.Setup([sys.argv[0], *of_fuzzer], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

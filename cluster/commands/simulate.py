"""`expertmesh simulate`: a whole cluster under virtual time, its faults drawn from a seed or written in a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from cluster.config import ConfigError

if TYPE_CHECKING:  # what it runs needs torch: seconds that other commands, and --help, should not wait
    from cluster.sim.run import Outcome
    from cluster.sim.scenario import Scenario

SEEDS_MAX = 1_000_000
_SEED_END = 1 << 32

DESCRIPTION = """\
Runs the real controller, scheduler, gateway ledger, dispatcher, books and batchers of a whole cluster under
virtual time, kills, freezes, cuts off and confuses its processes, and looks after every event whether every
promise is kept: blocks conserved, epochs complete and none retired while used, no attempt run twice, no stale
order obeyed, every token of every request right, once and in order. Then everything is healed, and must come to
rest.

The same seed is the same story. Exit code 1: a promise was broken, and how to see it again is said."""

EPILOG = """\
A scenario file has a line for the cluster, one for its requests, and one for each fault:

  cluster attention=2 experts=3 replicas=2 nodes=1 gateways=1    # also: hybrid=1 sums=1 microbatches=2
  requests count=12 over=6                                       # so many, within so many seconds
  at 3 kill expert-1
  at 4.5 freeze attention-0 for 3                                # see --faults for all
  heal 9                                                         # all faults end; 60 s later all is at rest

Examples:
  expertmesh simulate --seeds 0-999
  expertmesh simulate --seed 42 --trace                          # what happens, and when
  expertmesh simulate --seed 42 --print > it.scenario            # to change it by hand
  expertmesh simulate --scenario it.scenario --trace"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="run a cluster under virtual time with faults",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", metavar="N", help="one story: its faults, or a scenario's chances (default: 0)")
    which.add_argument("--seeds", metavar="A-B", help="all of them, one after another")
    parser.add_argument("--scenario", type=Path, metavar="FILE", help="this cluster and these faults")
    parser.add_argument("--trace", action="store_true", help="tell what happens, with virtual times in seconds")
    parser.add_argument("--print", action="store_true", help="print the scenario, and do not run it")
    parser.add_argument(
        "--faults", action="store_true", help="say what faults there are, and how they are written"
    )
    parser.add_argument("--json", action="store_true", help="an object for each seed, one a line")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from cluster.sim.run import run as simulate
    from cluster.sim.scenario import VERBS
    from cluster.sim.story import document, replay, summary

    if arguments.faults:
        print("\n".join(VERBS.values()))
        return 0
    scenario_of = _scenarios(arguments.scenario)
    seeds = _seeds(arguments.seeds) if arguments.seeds else range(_seed(arguments.seed), _seed(arguments.seed) + 1)
    if arguments.print:
        print("\n".join(scenario_of(seed).text for seed in seeds), end="")
        return 0
    tells: Callable[[str], None] = print if arguments.trace else lambda _line: None
    file, num_broken, events, took_s = str(arguments.scenario or ""), 0, 0, 0.0
    for outcome in _each(seeds, lambda seed: simulate(scenario_of(seed), tells)):
        num_broken, events, took_s = (
            num_broken + bool(outcome.broken),
            events + outcome.events,
            took_s + outcome.took_s,
        )
        if arguments.json:
            print(json.dumps(document(outcome, file)), flush=True)
        elif outcome.broken or len(seeds) == 1:
            print(summary(outcome), flush=True)
        if outcome.broken:
            print(f"again: {replay(outcome, file)}", file=sys.stderr, flush=True)
    if len(seeds) > 1 and not arguments.json:
        print(f"{len(seeds)} seeds, {num_broken} broken; {events} events, {events / took_s:,.0f} a second")
    return 1 if num_broken else 0


def _each(seeds: range, simulate: Callable[[int], Outcome]) -> Iterator[Outcome]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=len(seeds) == 1 or not console.is_terminal) as progress:
        for seed in progress.track(seeds, description="simulating"):
            yield simulate(seed)


def _scenarios(file: Path | None) -> Callable[[int], Scenario]:
    from cluster.sim.scenario import ScenarioError, drawn, parse

    if file is None:
        return drawn
    try:
        scenario = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--scenario: {str(file)!r}: {error.strerror}; accepted: a file of text") from error
    except (ScenarioError, UnicodeDecodeError) as error:
        raise ConfigError(f"--scenario: {str(file)!r}: {error}") from error
    return lambda seed: replace(scenario, seed=seed)


def _seed(given: str | None) -> int:
    seed = int(given) if given is not None and given.isdecimal() else -1
    if given is not None and not 0 <= seed < _SEED_END:
        raise ConfigError(f"--seed: {given!r}; accepted: 0 to {_SEED_END - 1}")
    return max(0, seed)


def _seeds(given: str) -> range:
    first, dash, last = given.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _SEED_END):
        raise ConfigError(
            f"--seeds: {given!r}; accepted: A-B, two numbers from 0 to {_SEED_END - 1}, A not above B"
        )
    if int(last) - int(first) >= SEEDS_MAX:
        raise ConfigError(f"--seeds: {given!r}; accepted: at most {SEEDS_MAX} of them")
    return range(int(first), int(last) + 1)

"""`expertmesh trace`: where the time of steps goes, as a summary and as a file for ui.perfetto.dev."""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attention_workers.trace_events import write_events
from attention_workers.trace_records import Snapshot, TraceMalformed, decode
from attention_workers.trace_summary import summarise
from cluster.commands.status import Unreachable, add_gateway, fetch_document
from cluster.config import ConfigError

SECONDS_MAX = 60.0
_TURN_S = 0.25  # between two signs of progress


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "trace",
        help="show where the time of steps goes",
        description="Watches a running cluster for a while, then shows what its attention workers spent on\n"
        "attention, dispatch, waiting, experts and merge, who was waited for, and the microbatches in use.",
        epilog="Example:  expertmesh trace --seconds 5 --out trace.json   # open it at https://ui.perfetto.dev\n"
        "          expertmesh trace --seconds 2 --json | python -m json.tool",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_gateway(parser)
    parser.add_argument("--seconds", default="5", metavar="N", help="how long, at most 60 (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Chrome trace events, as Perfetto reads them")
    parser.add_argument("--json", action="store_true", help="the summary for scripts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    seconds = _seconds(arguments.seconds)
    if arguments.out is not None and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise ConfigError(f"--out: {str(arguments.out)!r}; accepted: a file in a folder that is there")
    try:
        fetch(arguments.url, arguments.api_key, 0.001)  # before anybody waits in vain
        _watch(seconds)
        snapshots, silent = fetch(arguments.url, arguments.api_key, seconds)
        if arguments.out is not None:
            with arguments.out.open("w", encoding="utf-8") as out:
                count = write_events(snapshots, out)
            print(f"{count} events in {arguments.out}: open it at https://ui.perfetto.dev", file=sys.stderr)
    except (Unreachable, TraceMalformed, OSError) as error:
        print(f"expertmesh trace: {error}", file=sys.stderr)
        return 1
    summaries = [summarise(snapshot) for snapshot in snapshots]
    if arguments.json:
        print(json.dumps({"workers": summaries, "silent": silent}))
    else:
        show(summaries, silent, Console())
    return 0


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS_MAX:
        raise ConfigError(f"--seconds: {given!r}; accepted: a number above 0, at most {SECONDS_MAX:g}")
    return seconds


def fetch(url: str, api_key: str | None, seconds: float) -> tuple[list[Snapshot], list[str]]:
    """Of each attention worker, and who did not answer in time. Raises Unreachable or TraceMalformed."""
    document = fetch_document(url, api_key, f"/v1/admin/trace?seconds={seconds:g}", "traces")
    return [decode(base64.b64decode(trace)) for trace in document["traces"]], document["silent"]


def _watch(seconds: float) -> None:
    """The workers keep their traces anyway: to watch is to wait."""
    console = Console(stderr=True)
    end_s = time.monotonic() + seconds
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("watching", total=seconds)
        while (left_s := end_s - time.monotonic()) > 0:
            progress.update(task, completed=seconds - left_s)
            time.sleep(min(left_s, _TURN_S))


def show(summaries: list[dict[str, Any]], silent: list[str], console: Console) -> None:
    """For people."""
    for summary in summaries:
        forgotten = ", the newest of more" if summary["has_forgotten"] else ""
        console.print(
            f"{summary['worker']}: {summary['steps']} steps in {summary['covers_s']:.1f} s{forgotten}; waited for "
            f"experts {_percent(summary['exposed_wait_share'])} of their time, exchange "
            f"{_percent(summary['exchange_share'])}",
            highlight=False,
        )
        if summary["steps"]:
            console.print(_phases(summary), _stragglers(summary))
        for choice in summary["microbatches"]:
            console.print(_choice(choice), highlight=False)
    for worker in silent:
        console.print(f"{worker}: did not answer in time")


def _phases(summary: dict[str, Any]) -> Table:
    table = Table("per layer and microbatch", "p50 µs", "p99 µs", "share of steps", box=None, pad_edge=False)
    for name, spread in summary["phases_us"].items():
        share = _percent(spread["share"]) if "share" in spread else ""
        table.add_row(name, _number(spread["p50"]), _number(spread["p99"]), share)
    for kind, spread in summary["step_us"].items():
        if spread["p50"] is not None:
            table.add_row(f"a {kind} step, all layers", _number(spread["p50"]), _number(spread["p99"]), "")
    return table


def _stragglers(summary: dict[str, Any]) -> Table:
    columns = ("expert worker", "was last", "alone waited for, p50 µs", "p99 µs", "in all ms", "experts p50 µs")
    table = Table(*columns, box=None, pad_edge=False)
    for peer, told in summary["stragglers"].items():
        alone = told["alone_us"]
        table.add_row(
            peer, _percent(told["last_share"]), _number(alone["p50"]), _number(alone["p99"]),
            f"{told['alone_ms_total']:.1f}", _number(told["experts_us"]["p50"]),
        )  # fmt: skip
    return table


def _choice(choice: dict[str, Any]) -> str:
    ratios = [
        f"{m}: {choice['measured'].get(m, ratio):.2f} {'measured' if m in choice['measured'] else 'predicted'}"
        for m, ratio in choice["predicted"].items()
        if int(m) != choice["microbatches"]
    ]
    return (
        f"{choice['kind']} steps of up to {choice['rows_max']} rows: {choice['microbatches']} microbatch(es), "
        f"{choice['step_ms']:.2f} ms; others to it {', '.join(ratios)}; {choice['trials']} trials"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"

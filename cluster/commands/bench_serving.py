"""`expertmesh bench serving`: what a served model promises under load, over REST."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.commands.bench_faces import chosen, console, counts, failed, print_json, show_machine, teller
from cluster.commands.status import API_KEY_VARIABLE
from cluster.config import ConfigError

_PARTS = ("interruption", "prefix", "overload", "trace")
_LENGTHS = {  # flag -> default, least, what it is
    "--rounds": (5, 1, "of interruption and prefix"),
    "--decoders": (16, 1, "requests that decode when a long prompt arrives"),
    "--long-tokens": (3000, 64, "of that prompt"),
    "--prefix-tokens": (2000, 64, "that two requests share"),
    "--load-prompt": (64, 1, "tokens of a request of the overload"),
    "--load-answer": (32, 2, "tokens that it generates"),
    "--step": (20, 1, "seconds of each step of the ramp that finds the load that can be sustained"),
    "--seconds": (60, 1, "of three times that load"),
    "--first-token": (5, 1, "seconds in the queue that the server started here promises"),
    "--trace-requests": (60, 1, "of its beginning"),
    "--trace-seconds": (90, 1, "within which they are sent"),
}


def add_to(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "serving",
        help="what a served model promises: under long prompts, shared prefixes, overload, a trace",
        description="Starts `expertmesh serve` on free ports (or takes the server at --url), and asks over REST:\n"
        "  interruption  a long prompt among decodes: median time between their tokens, during over before\n"
        "  prefix        a second request that begins alike: its time to first token over the first's\n"
        "  overload      three times the load that can be sustained: goodput, refusals, latency, Retry-After\n"
        "  trace         the beginning of --trace, its tokens divided by 16: latency, cached share",
        epilog="Example:  expertmesh bench serving --model checkpoints/demo --rounds 5 --json\n"
        "          expertmesh bench serving --parts trace --trace mooncake_conversation.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("checkpoints/demo"), help="(default: %(default)s)")
    parser.add_argument("--url", help="of a gateway that runs already, instead of starting one")
    parser.add_argument("--api-key", default=os.environ.get(API_KEY_VARIABLE), help="if it asks for one")
    parser.add_argument("--parts", default="interruption,prefix,overload", help="(default: %(default)s)")
    parser.add_argument(
        "--trace", type=Path, help="JSON lines with timestamp, input_length, output_length, hash_ids"
    )
    for flag, (default, _, what) in _LENGTHS.items():
        parser.add_argument(flag, default=str(default), metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one document, for scripts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from benchmarks.errors import BenchmarkError
    from benchmarks.serving import Effort, serving
    from cluster.commands.own_serve import own_serve

    parts = chosen("--parts", arguments.parts, _PARTS)
    if ("trace" in parts) != (arguments.trace is not None):
        raise ConfigError(f"--trace: {arguments.trace}; accepted: a file, together with trace among --parts")
    n = {
        flag[2:].replace("-", "_"): counts(
            flag, getattr(arguments, flag[2:].replace("-", "_")), least, 1 << 20, 1
        )[0]
        for flag, (_, least, _) in _LENGTHS.items()
    }
    effort = Effort(
        n["rounds"], n["decoders"], n["long_tokens"], n["prefix_tokens"], n["load_prompt"], n["load_answer"],
        n["step"], n["seconds"],
    )  # fmt: skip
    trace = (arguments.trace, n["trace_requests"], float(n["trace_seconds"])) if arguments.trace else None
    tell = teller()
    settings: dict[str, object] = {"model": str(arguments.model), "scheduler": {"first_token_s": n["first_token"]}}
    try:
        with contextlib.nullcontext(arguments.url) if arguments.url else own_serve(settings, (), tell) as url:
            found = serving(url, arguments.api_key, effort, trace, parts, tell)
    except BenchmarkError as error:
        return failed("serving", error)
    if arguments.json:
        effort_shown = dataclasses.asdict(effort) | {"first_token_s": None if arguments.url else n["first_token"]}
        print_json(
            "serving", effort=effort_shown, **{name: dataclasses.asdict(one) for name, one in found.items()}
        )
    else:
        show(found, console())
    return 0


def show(found: dict[str, Any], out: Console) -> None:
    show_machine(out)
    table = Table("what", "median", "least", "most", "", box=None)
    if one := found.get("interruption"):
        about = (
            f"{one.beside_ms.p50:.1f} ms alone, {one.during_ms.p50:.1f} while the prompt was processed, "
            f"{one.first_token_s.p50:.1f} s"
        )
        table.add_row("between tokens, with a long prompt", *_spread(one.ratio), about)
    if one := found.get("prefix"):
        about = f"{one.first_ms.p50:.0f} ms, then {one.second_ms.p50:.0f}"
        table.add_row("first token, with a shared prefix", *_spread(one.ratio), about)
    if table.rows:
        out.print(table)
    if one := found.get("overload"):
        _show_overload(one, out)
    if one := found.get("trace"):
        _show_trace(one, out)


def _show_trace(one: Any, out: Console) -> None:
    first, gap, num_failed = one.first_token_s, one.gap_ms, len(one.failures)
    lines = (
        f"{one.requests} requests of the trace, times stretched {one.stretch:.1f}-fold, {num_failed} failed",
        f"first token p50 {first.p50:.2f} s, p99 {first.p99:.2f}",
        f"between tokens p50 {gap.p50:.0f} ms, p99 {gap.p99:.0f}",
        f"cached {one.cached_share:.3f} of {one.prompt_tokens} prompt tokens, ideally {one.ideal_share:.3f}",
    )
    for line in lines:
        out.print(line, highlight=False)


def _show_overload(one: Any, out: Console) -> None:
    table = Table("clients in a loop", "requests/s", "tokens/s", "first token: p50", "p99", box=None)
    for step in one.ramp:
        first = step.first_token_ms
        numbers = (
            f"{step.requests_per_s:.1f}",
            f"{step.tokens_per_s:.0f}",
            f"{first.p50:.0f} ms",
            f"{first.p99:.0f}",
        )
        table.add_row(str(step.clients), *numbers)
    out.print(table)
    told = one.retry_after_s
    lines = (
        f"{one.offered_per_s:.1f} requests/s for {one.seconds:g} s: {one.num_offered} offered, {one.num_admitted} "
        f"served, {one.num_refused} refused by 429, {len(one.failures)} failed",
        f"goodput {one.goodput:.2f} of its peak, {one.peak_tokens_per_s:.0f} tokens/s; first token of the served "
        f"p50 {one.first_token_s.p50:.2f} s, p99 {one.first_token_s.p99:.2f}; between tokens p50 "
        f"{one.gap_ms.p50:.0f} ms, p99 {one.gap_ms.p99:.0f}",
        f"Retry-After {told.min:.0f} to {told.max:.0f} s, median {told.p50:.0f}; {one.got_in} of {one.came_back} "
        "that came back when told got in at once" if told else "none was told to come again",
        *(f"failed: {why}" for why in one.failures[:5]),
    )  # fmt: skip
    for line in lines:
        out.print(line, highlight=False)


def _spread(ratio: Any) -> tuple[str, str, str]:
    return f"{ratio.p50:.2f}", f"{ratio.min:.2f}", f"{ratio.max:.2f}"

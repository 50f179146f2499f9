"""`expertmesh bench`: what the parts cost on this machine. Each benchmark is a file in `benchmarks/`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.table import Table

from cluster.commands import bench_serving
from cluster.commands.bench_faces import (
    chosen,
    console,
    counts,
    failed,
    print_json,
    refuse_many,
    show_machine,
    teller,
)
from cluster.config import ConfigError

if TYPE_CHECKING:
    from benchmarks.decode import Outcome, Topology
    from benchmarks.samples import Samples
    from benchmarks.scheduler import Point
    from benchmarks.transport import Bandwidth, Crossing

T = TypeVar("T")

_COUNT_MAX = 1 << 20
_LINKS = ("local", "shm", "grpc")  # those after the first between processes


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure exchange, decoding, the scheduler and serving on this machine",
        description="Measures on this machine, without Ray and without a running cluster; `serving` starts one.\n"
        "Results go to standard output, progress to standard error. Figures and how they came about:\n"
        "docs/benchmarks.md.",
        epilog="Example:  expertmesh bench transport --kinds shm,grpc\n"
        "          expertmesh bench decode --model checkpoints/bench --batches 8,32 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_transport(benchmarks)
    _add_decode(benchmarks)
    _add_scheduler(benchmarks)
    bench_serving.add_to(benchmarks)


def _add_transport(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "transport",
        help="round trips and bandwidth between two processes, by kind of link",
        description="Round trips of parcels between two processes, many parcels in flight, and the bandwidth of\n"
        "4 MB one way, read in place, against memcpy in the same run. A faulty link is another as bad or slow as\n"
        "said. Between GPUs: python -m benchmarks.gpu_links --help",
        epilog="Example:  expertmesh bench transport --kinds shm --rows 8 --hidden 768\n"
        "          expertmesh bench transport --kinds shm,faulty:shm:latency_s=0.001,bytes_per_s=1e8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds",
        default="local,shm,grpc",
        metavar="KIND,...",
        help="of link: local, shm, grpc, faulty:shm:name=value,..., faulty:grpc:... (default: %(default)s)",
    )
    parser.add_argument("--rows", default="8,1,64,256", metavar="N,...", help="of a parcel (default: %(default)s)")
    parser.add_argument(
        "--hidden", default="768", metavar="H,...", help="elements of a row (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="bfloat16 (default) or float32")
    parser.add_argument("--round-trips", default="2000", metavar="N", help="of each shape (default: %(default)s)")
    parser.add_argument(
        "--in-flight", default="8", metavar="N", help="parcels under way at once (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one document, for scripts")
    parser.set_defaults(run=_transport)


def _add_decode(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "decode",
        help="tokens a second, taken apart against all in one process",
        description="Decodes with attention and experts on processes of their own, and with everything in one\n"
        "process, in turns, so that both see the same machine. In exact mode all must bring the same tokens.",
        epilog="Example:  expertmesh bench decode --batches 8,32 --microbatches 1 --numerics exact,fast\n"
        "of the model of  expertmesh make-checkpoint --preset bench --out checkpoints/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, default=Path("checkpoints/bench"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--numerics", default="exact", metavar="KINDS", help="exact (default), fast, or both: exact,fast"
    )
    parser.add_argument("--batches", default="1,8,32", metavar="N,...", help="sequences (default: %(default)s)")
    parser.add_argument(
        "--microbatches", default="1,2", metavar="N,...", help="slices of a step (default: %(default)s)"
    )
    parser.add_argument("--transports", default="shm,grpc", metavar="KINDS", help="(default: %(default)s)")
    parser.add_argument(
        "--topologies",
        default="1x1,1x2",
        metavar="AxE,...",
        help="attention x expert processes (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", default="1,2", metavar="N,...", help="of the one process (default: %(default)s)"
    )
    parser.add_argument("--context", default="64", metavar="TOKENS", help="of each prompt (default: %(default)s)")
    parser.add_argument("--steps", default="4", metavar="N", help="in a row (default: %(default)s)")
    parser.add_argument("--rounds", default="5", metavar="N", help="of all ways in turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one document, for scripts")
    parser.set_defaults(run=_decode)


def _add_scheduler(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "scheduler",
        help="one round of the central scheduler, decoding and encoding included",
        description="What a round costs on one core, over a growing number of running sequences: when all\n"
        "of them end, when all their prompts end, each with a plan for every worker, and when nothing happens.",
        epilog="Example:  expertmesh bench scheduler --sequences 100,10000 --repeats 5 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", default="64", metavar="N", help="attention workers (default: %(default)s)")
    parser.add_argument(
        "--sequences", default="100,300,1000,3000,10000", metavar="N,...", help="(default: %(default)s)"
    )
    parser.add_argument("--repeats", default="5", metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one document, for scripts")
    parser.set_defaults(run=_scheduler)


# --- transport -------------------------------------------------------------------------------------


def _transport(arguments: argparse.Namespace) -> int:
    # Here, as below: every other command starts without torch.
    from benchmarks.errors import BenchmarkError
    from benchmarks.transport import DTYPES, Effort, Shape, measure

    kinds = _links(arguments.kinds)
    [dtype] = chosen("--dtype", arguments.dtype, list(DTYPES), most=1)
    hidden = counts("--hidden", arguments.hidden, 8, 1 << 16)
    rows = counts("--rows", arguments.rows, 1, 1 << 12)
    [round_trips] = counts("--round-trips", arguments.round_trips, 10, _COUNT_MAX, most=1)
    [in_flight] = counts("--in-flight", arguments.in_flight, 1, 16, most=1)
    shapes = [Shape(n, h, dtype) for h in hidden for n in rows]
    try:
        crossings, bandwidths = measure(kinds, shapes, Effort(round_trips, in_flight), teller())
    except BenchmarkError as error:
        return failed("transport", error)
    if arguments.json:
        print_json(
            "transport",
            crossings=[dataclasses.asdict(crossing) for crossing in crossings],
            bandwidths=[dataclasses.asdict(found) | {"of_memcpy": found.of_memcpy} for found in bandwidths],
        )
    else:
        _show_transport(crossings, bandwidths, console())
    return 0


def _links(text: str) -> list[str]:
    """Kinds of link; a faulty one has commas of its own. Raises ConfigError."""
    from router.transport.faults import Faults

    kinds: list[str] = []
    for part in text.split(","):
        if kinds and kinds[-1].startswith("faulty:") and "=" in part and ":" not in part:
            kinds[-1] += f",{part}"
        else:
            kinds.append(part)
    for kind in kinds:
        scheme, _, rest = kind.partition(":")
        wrapped, _, faults = rest.partition(":")
        if kind not in _LINKS and (scheme != "faulty" or wrapped not in _LINKS[1:]):
            raise ConfigError(f"--kinds: {kind!r}; accepted: {', '.join(_LINKS)}, faulty:shm:name=value,..., "
                              "faulty:grpc:name=value,...")  # fmt: skip
        try:
            Faults.parse(faults)
        except ValueError as error:
            raise ConfigError(f"--kinds: {kind!r}: {error}") from None
    refuse_many("--kinds", kinds)
    return kinds


def _show_transport(crossings: list[Crossing], bandwidths: list[Bandwidth], console: Console) -> None:
    show_machine(console)
    table = Table("link", "parcel", "there and back: p50", "p99", "least", "in flight", "parcels/s", box=None)
    for found in crossings:
        parcel = f"{found.shape.rows} x {found.shape.hidden} {found.shape.dtype}"
        trip = (
            f"{us:.0f} us" for us in (found.round_trip_us.p50, found.round_trip_us.p99, found.round_trip_us.min)
        )
        table.add_row(found.kind, parcel, *trip, str(found.in_flight), f"{found.parcels_per_s:,.0f}")
    console.print(table)
    for large in bandwidths:
        console.print(
            f"{large.kind}: 4 MB one way, read in place {large.one_way.p50:.1f} GB/s, read through "
            f"{large.read_through.p50:.1f} GB/s; memcpy {large.memcpy.p50:.1f} GB/s: {large.of_memcpy:.0%} of it",
            highlight=False,
        )


# --- decode ----------------------------------------------------------------------------------------


def _decode(arguments: argparse.Namespace) -> int:
    from benchmarks.decode import Task, measure
    from benchmarks.errors import BenchmarkError
    from model.errors import ModelError

    batches = counts("--batches", arguments.batches, 1, 256)
    [context] = counts("--context", arguments.context, 1, _COUNT_MAX, most=1)
    [steps] = counts("--steps", arguments.steps, 1, 1000, most=1)
    [rounds] = counts("--rounds", arguments.rounds, 1, 1000, most=1)
    task = Task(
        arguments.model,
        tuple(chosen("--numerics", arguments.numerics, ["exact", "fast"])),  # type: ignore[arg-type]
        tuple(batches),
        tuple(counts("--microbatches", arguments.microbatches, 1, 4)),
        tuple(chosen("--transports", arguments.transports, ["shm", "grpc"])),
        tuple(_topologies(arguments.topologies)),
        tuple(counts("--threads", arguments.threads, 1, 256)),
        context, steps, rounds,
    )  # fmt: skip
    try:
        outcome = measure(task, teller())
    except (BenchmarkError, ModelError) as error:
        return failed("decode", error)
    if arguments.json:
        print_json(
            "decode",
            context=context,
            steps=steps,
            lanes=[
                {
                    **dataclasses.asdict(found.lane), "name": found.lane.name, "batch": found.batch,
                    "tokens_per_s": found.tokens_per_s.as_dict(), "step_ms": found.step_samples_ms.as_dict(),
                }
                for found in outcome.measured
            ],
            comparisons=[
                {
                    "what": found.what, "batch": found.batch, "over": found.over.name, "under": found.under.name,
                    "ratio": found.ratio.as_dict(),
                }
                for found in outcome.comparisons
            ],
            exact_tokens_equal=outcome.tokens_compared,
        )  # fmt: skip
    else:
        _show_decode(outcome, f"prompts of {context} tokens, {rounds} rounds of {steps} steps", console())
    return 0


def _topologies(text: str) -> list[Topology]:
    from benchmarks.decode import Topology

    found = []
    for part in text.split(","):
        attention, _, experts = part.strip().partition("x")
        try:
            topology = Topology(int(attention), int(experts))
        except ValueError:
            topology = Topology(0, 0)
        if not (1 <= topology.attention <= 8 and 1 <= topology.experts <= 8):
            raise ConfigError(f"--topologies: {part!r}; accepted: AxE, 1 to 8 processes each, as 1x2")
        found.append(topology)
    return found


def _show_decode(outcome: Outcome, how: str, console: Console) -> None:
    show_machine(console)
    console.print(how, highlight=False)
    table = Table("batch", "way", "tokens/s: median", "least", "most", "step: least", box=None)
    for found in outcome.measured:
        rate: Samples = found.tokens_per_s
        table.add_row(
            str(found.batch), found.lane.name, f"{rate.p50:.1f}", f"{rate.min:.1f}", f"{rate.max:.1f}",
            f"{found.step_samples_ms.min:.1f} ms",
        )  # fmt: skip
    console.print(table)
    table = Table("batch", "ratio", "median", "least", "most", "of", "to", box=None)
    for c in outcome.comparisons:
        shown = (f"{value:.2f}" for value in (c.ratio.p50, c.ratio.min, c.ratio.max))
        table.add_row(str(c.batch), c.what, *shown, c.over.name, c.under.name)
    console.print(table)
    if outcome.tokens_compared:
        console.print(f"{outcome.tokens_compared} tokens of exact ways compared: all equal", highlight=False)


# --- scheduler -------------------------------------------------------------------------------------


def _scheduler(arguments: argparse.Namespace) -> int:
    from benchmarks.scheduler import TARGET_MS, TARGET_SEQUENCES, measure

    [workers] = counts("--workers", arguments.workers, 1, 1000, most=1)
    sequences = counts("--sequences", arguments.sequences, 1, 100_000)
    [repeats] = counts("--repeats", arguments.repeats, 1, 1000, most=1)
    tell, points = teller(), []
    for count in sequences:
        tell(f"{count} sequences at {workers} workers")
        points.append(measure(count, workers, repeats))
    is_constant = len({found.undisturbed_bytes for found in points}) == 1
    if arguments.json:
        print_json(
            "scheduler",
            target={"ms": TARGET_MS, "sequences": TARGET_SEQUENCES, "workers": 64},
            undisturbed_bytes_constant=is_constant,
            points=[dataclasses.asdict(found) for found in points],
        )
    else:
        _show_scheduler(points, is_constant, console())
    return 0


def _show_scheduler(points: list[Point], is_constant: bool, console: Console) -> None:
    from benchmarks.scheduler import TARGET_MS, TARGET_SEQUENCES

    show_machine(console)
    table = Table("sequences", "all end", "all prompts end", "undisturbed", "its bytes", box=None)
    for found in points:
        times = (f"{ms:.2f} ms" for ms in (found.ending_ms, found.prompts_ms, found.undisturbed_ms))
        table.add_row(str(found.sequences), *times, str(found.undisturbed_bytes))
    console.print(table)
    if len(points) > 1:
        console.print(f"bytes of an undisturbed round depend on the batch: {'no' if is_constant else 'YES'}")
    for found in points:
        if (found.sequences, found.workers) == (TARGET_SEQUENCES, 64):
            verdict = "met" if found.worst_ms <= TARGET_MS else "MISSED"
            console.print(f"target, at most {TARGET_MS:g} ms: {found.worst_ms:g} ms, {verdict}", highlight=False)

"""What FP8 rows out and weighted sums back cost and save: one layer's exchange, from plan to merge.

    python -m benchmarks.encodings --kinds shm,grpc --workers 2,4 --tokens 8,32,256 --hidden 768,3072

Expert workers are processes of their own and compute nothing: each route's row is its answer, so that coding,
copying, crossing and merging are all that is left. Encodings take turns within a round, so that all see the same
machine. Legend: T tokens · H hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.spawned import spawned
from model.gate import Routes
from router.config import Replies, RouterConfig, RowsSent
from router.dispatcher import Dispatcher
from router.placement import EpochId, Member, spread
from router.rows import sums, unpack
from router.transport import frame
from router.transport.base import ExpertEnd, LinkIdentity
from router.transport.select import attention_end, expert_end

ENCODINGS: tuple[tuple[RowsSent, Replies], ...] = (
    ("plain", "rows"), ("fp8", "rows"), ("plain", "sums"), ("fp8", "sums"),
)  # fmt: skip
NUM_EXPERTS, TOP_K = 256, 8

_DTYPE = torch.bfloat16
_TURN_S = 0.2
_START_S = 120.0


@dataclass(frozen=True)
class Case:
    kind: str
    workers: int
    tokens: int
    hidden: int


@dataclass(frozen=True)
class Outcome:
    case: Case
    rows: RowsSent
    replies: Replies
    p50_us: float
    ratio: float  # to plain rows both ways: median over rounds
    bytes_out: int
    bytes_back: int


def measure(cases: list[Case], rounds: int, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Raises BenchmarkError."""
    for case in cases:
        say(f"{case.kind}: {case.workers} workers, {case.tokens} x {case.hidden}, {rounds} rounds")
        with contextlib.ExitStack() as stack:
            lanes = [stack.enter_context(_lane(case, rows, replies)) for rows, replies in ENCODINGS]
            yield from _compare(case, lanes, rounds)


def _compare(case: Case, lanes: list[Dispatcher], rounds: int) -> list[Outcome]:
    chance = torch.Generator().manual_seed(1)
    rows = torch.randn(case.tokens, case.hidden, generator=chance).to(_DTYPE)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=chance)[:TOP_K] for _ in range(case.tokens)])
    routes = Routes(ids, torch.full((case.tokens, TOP_K), 1 / TOP_K))
    took_us: list[list[float]] = [[] for _ in lanes]
    for number in range(rounds + 5):
        for lane, times in zip(lanes, took_us, strict=True):
            began_ns = time.perf_counter_ns()
            merged = lane.combine(lane.dispatch(0, rows, routes))
            took = (time.perf_counter_ns() - began_ns) / 1e3
            if not torch.allclose(merged, rows.float(), rtol=0.08, atol=0.05):
                raise BenchmarkError(f"{case}: the sum is wrong")
            if number >= 5:
                times.append(took)
    return [
        Outcome(
            case, how[0], how[1], statistics.median(times),
            statistics.median(ours / plain for ours, plain in zip(times, took_us[0], strict=True)),
            *_bytes(case, how, lane),
        )
        for how, lane, times in zip(ENCODINGS, lanes, took_us, strict=True)
    ]  # fmt: skip


def _bytes(case: Case, how: tuple[RowsSent, Replies], lane: Dispatcher) -> tuple[int, int]:
    """Of one layer, both ways, frames included."""
    limits = frame.limits_of(_identity("a", case, *how), RouterConfig())
    counts = lane.counters()
    dispatches = counts["parcels"] / case.workers
    rows, routes = round(counts["rows"] / dispatches), round(counts["routes"] / dispatches)
    out = frame.parcel_bytes(rows, routes, limits) + (case.workers - 1) * frame.HEADER_BYTES
    back = frame.reply_bytes(rows if limits.sums else routes, limits) + (case.workers - 1) * frame.HEADER_BYTES
    return out, back


# --- experts -------------------------------------------------------------------------------------


def expert_process(pipe: Connection, kind: str, identity: LinkIdentity) -> None:
    """Tells its address, then answers until killed."""
    torch.set_num_threads(1)
    end = expert_end(kind, identity, _config(identity.hidden))
    pipe.send(end.address)
    while not pipe.poll():
        _answer(end, identity)


def _answer(end: ExpertEnd, identity: LinkIdentity) -> None:
    while (parcel := end.receive(_TURN_S)) is not None:
        rows = unpack(parcel.rows, identity.hidden) if identity.rows == "fp8" else parcel.rows
        out = rows.index_select(0, parcel.route_rows)
        if parcel.route_weights is not None:
            out = sums(out, parcel.route_weights, parcel.route_rows, len(rows))
        end.reply(parcel, out)


@contextlib.contextmanager
def _lane(case: Case, rows: RowsSent, replies: Replies) -> Iterator[Dispatcher]:
    me = _identity("attention", case, rows, replies)
    with contextlib.ExitStack() as stack:
        members = []
        for number in range(case.workers):
            who = _identity(f"expert-{number}", case, rows, replies)
            child = stack.enter_context(spawned(f"{case.kind} {who.member.id}", expert_process, case.kind, who))
            members.append((who.member, child.hear(_START_S)))
        config = _config(case.hidden)
        dispatcher = Dispatcher(
            attention_end(case.kind, me, config), me.member, config, lambda _: None, rows, replies
        )
        stack.callback(dispatcher.close)
        dispatcher.prepare(spread(EpochId(1, 1), me.fingerprint, members, 1, NUM_EXPERTS, 1))
        dispatcher.adopt()
        yield dispatcher


def _identity(name: str, case: Case, rows: RowsSent, replies: Replies) -> LinkIdentity:
    return LinkIdentity(Member(name, 1), "benchmark", "", case.hidden, _DTYPE, rows, replies)


def _config(hidden: int) -> RouterConfig:
    return RouterConfig(connect_timeout_s=20.0, combine_timeout_s=20.0).fitted(TOP_K, hidden, _DTYPE.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["shm", "grpc"])
    for name, usual in (("workers", [2, 4]), ("tokens", [8, 32, 256]), ("hidden", [768, 3072])):
        parser.add_argument(f"--{name}", type=lambda text: [int(part) for part in text.split(",")], default=usual)
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(*each) for each in itertools.product(asked.kinds, asked.workers, asked.tokens, asked.hidden)
    ]  # fmt: skip
    print("| link | workers | tokens x hidden | rows out, back | p50 us | to plain rows | kB out | kB back |")
    print("|---|---|---|---|---|---|---|---|")
    for outcome in measure(cases, asked.rounds, lambda said: print(said, file=sys.stderr)):
        case = outcome.case
        cells = (
            case.kind, case.workers, f"{case.tokens} x {case.hidden}", f"{outcome.rows}, {outcome.replies}",
            f"{outcome.p50_us:.0f}", f"{outcome.ratio:.2f}", f"{outcome.bytes_out / 1e3:.0f}",
            f"{outcome.bytes_back / 1e3:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()

"""What microbatches hide on a slow link: the formula's step time against the measured one.

    python -m benchmarks.overlap            # a table, about two minutes
    python -m benchmarks.overlap --json --auto

The order of work, the dispatcher, the exchange (shared memory under a link of given latency and width) and the
step trace are the real ones, with an expert worker in a thread of its own. Only computing is stood in for, by
waits of a given cost, so that a machine with two cores shows what two devices would do. The formula is fed what
the trace measured with one microbatch of several sizes, never the costs that were asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attention_workers.decode import decode_step
from attention_workers.microbatch_choice import MicrobatchChoice, Phases, kind_of
from attention_workers.overlap import Affine, Costs, Fit, hides_from, step_cost
from attention_workers.step_trace import StepTrace
from model.gate import Routes
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.placement import EpochId, Member, spread
from router.transport.base import ExpertEnd, LinkIdentity, Spent
from router.transport.select import attention_end, expert_end

HIDDEN = 1024
LAYERS = 6
ROWS = 48
MOST = 3
_ROUNDS = 9
_PATIENCE_S = 10.0
_TURN_S = 0.1

ATTENTION = Affine(slope=100e3, fixed=4e6)  # ns
EXPERTS = Affine(slope=100e3, fixed=4e6)


@dataclass(frozen=True)
class LinkShape:
    """One way."""

    latency_ms: float
    mb_per_s: float | None = None

    @property
    def transport(self) -> str:
        width = "" if self.mb_per_s is None else f",bytes_per_s={self.mb_per_s * 1e6:g}"
        return f"faulty:shm:latency_s={self.latency_ms / 1e3:g}{width}"


LINKS = (
    LinkShape(0.0), LinkShape(2.0), LinkShape(6.0), LinkShape(12.0), LinkShape(2.0, 20.0), LinkShape(6.0, 10.0),
    LinkShape(2.0, 5.0),
)  # fmt: skip


class WaitingModel:
    """What `decode_step` needs of a model; to compute is to wait."""

    config = SimpleNamespace(num_layers=LAYERS)

    def attend(self, _layer: int, mb: Any) -> Any:
        wait_until(time.perf_counter_ns() + ATTENTION.at(len(mb.hidden)))
        return mb.hidden

    def norm_before_experts(self, _layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def gate(self, _layer: int, normed: Tensor) -> Routes:
        return Routes(torch.zeros(len(normed), 1, dtype=torch.int64), torch.ones(len(normed), 1))

    def unembed(self, mb: Any) -> Any:
        return mb.hidden


def wait_until(at_ns: float) -> None:
    time.sleep(max(0.0, at_ns - time.perf_counter_ns()) / 1e9)


def answer(end: ExpertEnd, stopping: threading.Event) -> None:
    """An expert worker, one parcel after another."""
    while not stopping.is_set():
        parcel = end.receive(_TURN_S)
        if parcel is not None:
            began_ns = time.perf_counter_ns()
            wait_until(began_ns + EXPERTS.at(len(parcel.rows)))
            end.reply(parcel, parcel.rows[parcel.route_rows.long()], Spent(0, time.perf_counter_ns() - began_ns))


class Pair:
    """One attention and one expert worker at the ends of a link."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.trace = StepTrace(dispatcher)
        self.dispatcher = dispatcher

    @torch.inference_mode()
    def step(self, rows: int, microbatches: int) -> Phases:
        model: Any = WaitingModel()
        parts: list[Any] = [
            SimpleNamespace(hidden=part) for part in torch.zeros(rows, HIDDEN).bfloat16().chunk(microbatches)
        ]
        self.trace.begin(kind_of(rows, False), rows, rows)
        decode_step(model, parts, self.dispatcher, self.trace)
        return self.trace.end(microbatches)


@contextlib.contextmanager
def linked(shape: LinkShape) -> Iterator[Pair]:
    def identity(member: Member) -> LinkIdentity:
        return LinkIdentity(member, "overlap", "", HIDDEN, torch.bfloat16)

    config = RouterConfig(combine_timeout_s=_PATIENCE_S)
    own, peer, stopping = Member("attention-0", 1), Member("expert-0", 1), threading.Event()
    expert = expert_end(shape.transport, identity(peer), config)
    answering = threading.Thread(target=answer, args=(expert, stopping))
    answering.start()
    dispatcher = Dispatcher(attention_end(shape.transport, identity(own), config), own, config, lambda _: None)
    try:
        dispatcher.prepare(spread(EpochId(1, 1), "overlap", [(peer, expert.address)], LAYERS, 1, 1))
        dispatcher.adopt()
        yield Pair(dispatcher)
    finally:
        stopping.set()
        expert.wake()
        answering.join()
        dispatcher.close()
        expert.close()


def rounds(pair: Pair) -> tuple[dict[int, list[Phases]], dict[int, list[float]]]:
    """Phases of one microbatch by rows, and milliseconds of a step of `ROWS` by microbatches: in turn, so that a
    busy moment of the machine is everybody's."""
    alone: dict[int, list[Phases]] = {ROWS // part: [] for part in range(1, MOST + 1)}
    took: dict[int, list[float]] = {m: [] for m in range(1, MOST + 1)}
    for _ in range(_ROUNDS):
        for rows, phases in alone.items():
            phases.append(pair.step(rows, 1))
        took[1].append(alone[ROWS][-1].step_ns / 1e6)
        for m in range(2, MOST + 1):
            took[m].append(pair.step(ROWS, m).step_ns / 1e6)
    return alone, took


def fitted(alone: dict[int, list[Phases]]) -> Costs:
    """Of the medians, for one step in ten meets a neighbour."""
    fits = Fit(), Fit(), Fit()
    for rows, steps in alone.items():
        _, *phases = (statistics.median(phase) for phase in zip(*steps, strict=True))
        for fit, cost in zip(fits, phases, strict=True):
            fit.add(rows, cost)
    lines = [fit.line() for fit in fits]
    return Costs(*(line for line in lines if line is not None))


def measure(shape: LinkShape, auto_steps: int) -> dict[str, Any]:
    with linked(shape) as pair:
        pair.step(ROWS, 1)
        alone, took = rounds(pair)
        costs = fitted(alone)
        predicted = {m: step_cost(costs, ROWS, m, LAYERS) / 1e6 for m in took}
        measured = {m: statistics.median(each) for m, each in took.items()}
        choice = MicrobatchChoice("auto", LAYERS)
        kind = kind_of(ROWS, False)
        for _ in range(auto_steps):
            m = choice.choose(kind, MOST)
            choice.measured(kind, m, ROWS, pair.step(ROWS, m))
    return {
        "latency_ms": shape.latency_ms,
        "mb_per_s": shape.mb_per_s,
        "hidden_from_microbatches": round(hides_from(costs, ROWS / 2), 2),
        "predicted_ms": {str(m): round(value, 2) for m, value in predicted.items()},
        "measured_ms": {str(m): round(value, 2) for m, value in measured.items()},
        "off": {str(m): round(measured[m] / predicted[m] - 1, 3) for m in measured},
        "auto": choice.current(kind) if auto_steps else None,
        "auto_knows": choice.explain()[0] if auto_steps else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time by microbatches on slow links, predicted and measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--auto", type=int, nargs="?", const=160, default=0, metavar="STEPS",
                        help="have `microbatches: auto` choose within so many steps (160)")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for shape in LINKS:
        results.append(result := measure(shape, arguments.auto))
        if not arguments.json:
            print(line(result), flush=True)
    if arguments.json:
        print(json.dumps({"layers": LAYERS, "rows": ROWS, "hidden": HIDDEN, "links": results}))


def line(result: dict[str, Any]) -> str:
    width = "unlimited" if result["mb_per_s"] is None else f"{result['mb_per_s']:g} MB/s"
    parts = [
        f"m={m}: {result['predicted_ms'][m]:6.1f} ms predicted, {result['measured_ms'][m]:6.1f} measured "
        f"({100 * result['off'][m]:+5.1f} %)"
        for m in result["measured_ms"]
    ]
    auto = "" if result["auto"] is None else f"  auto: {result['auto']}"
    return f"{result['latency_ms']:3g} ms, {width:>10}  " + "   ".join(parts) + auto


if __name__ == "__main__":
    main()

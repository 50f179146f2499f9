"""The balancer against the published greedy one, on the same loads: balance, moves and time.

The published one is EPLB as DeepSeek describes it (deepseek-ai/EPLB, global form): give a replica to whichever
expert has most load per replica until all slots are taken, then pack replicas by descending load onto the worker
with least that has a slot left; equal slots on every worker; from scratch each time. It does not know where
experts are, nor that a worker must not hold one twice: such twins are dropped here, as an expert worker would.

Both see how often the first half of the microbatches read each expert. Then the second half is planned by the real
`router.plan` on what they made of it: what is compared is what expert workers would be asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.balancer.place import Policy, place
from cluster.balancer.table import Room, Table, even_slots
from model.checkpoint import Checkpoint
from model.gate import Routes
from model.reference import Reference
from model.synthetic import make_checkpoint
from router.placement import EpochId, Member, PlacedWorker, Placement, spread
from router.plan import plan

Ids = NDArray[np.int64]
Loads = NDArray[np.float64]
TARGET = 1.10
_EPOCH = EpochId(1, 1)


@dataclass(frozen=True)
class Case:
    name: str
    workers: int
    spare: int  # slots of each worker and layer beyond its share
    ids: Ids  # [S, L, T, K]: of S microbatches
    num_experts: int


@dataclass(frozen=True)
class Outcome:
    """The busiest worker's load by the mean, summed over layers: `modelled` as the balancer sees it, `reads` and
    `rows` of the second half as planned; `step`: the mean of single microbatches' reads."""

    case: str
    workers: int
    slots: int  # of each worker and layer
    who: str
    moves: int
    modelled: float
    reads: float
    step: float
    rows: float
    seconds: float


# --- loads -----------------------------------------------------------------------------------------


def drawn(exponent: float, layers: int, experts: int, top: int, tokens: int, batches: int, seed: int) -> Ids:
    """[S, L, T, K]: experts of each token drawn without replacement by Zipf's law, each layer in its own order."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1) ** -exponent
    order = np.stack([rng.permutation(experts) for _ in range(layers)])
    keys = np.log(weights) + rng.gumbel(size=(batches, layers, tokens, experts))
    ranked = np.argpartition(-keys, top, axis=-1)[..., :top]
    return np.take_along_axis(order[None, :, None, :], ranked, axis=-1)


class _Watched(Reference):
    """Writes down which experts each layer chose."""

    chosen: list[Tensor]

    def _route(self, prefix: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights, gap = super()._route(prefix, h)
        self.chosen.append(ids)
        return ids, weights, gap


def of_the_demo(tokens: int, batches: int, seed: int) -> Ids:
    """[S, L, T, K]: what the demo model's own gates choose for random prompts."""
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("demo", Path(folder) / "demo", seed=0)
        checkpoint = Checkpoint.open(Path(folder) / "demo")
        model, found = _Watched(checkpoint), []
        for _ in range(batches):
            model.chosen = []
            model.logits(torch.randint(0, checkpoint.config.vocab_size, (tokens,), generator=generator).tolist())
            found.append(torch.stack(model.chosen).numpy())
    return np.stack(found)


def load_of(case: Case, ids: Ids) -> Loads:
    """[L, E]: microbatches that read each expert."""
    load = np.zeros((ids.shape[1], case.num_experts))
    for microbatch in ids:
        for layer, chosen in enumerate(microbatch):
            load[layer, np.unique(chosen)] += 1
    return load


# --- the published greedy --------------------------------------------------------------------------


def eplb(load: Loads, workers: int, slots: int) -> list[list[int]]:
    """load [E] of one layer -> experts of each worker, twins dropped."""
    counts = np.ones(len(load), dtype=np.int64)
    for _ in range(workers * slots - len(load)):
        counts[np.argmax(load / counts)] += 1
    replicas = sorted(
        ((load[expert] / counts[expert], expert) for expert in range(len(load)) for _ in range(counts[expert])),
        key=lambda pair: (-pair[0], pair[1]),
    )
    hands: list[list[int]] = [[] for _ in range(workers)]
    levels = [0.0] * workers
    for weight, expert in replicas:
        worker = min((w for w in range(workers) if len(hands[w]) < slots), key=lambda w: levels[w])
        hands[worker].append(expert)
        levels[worker] += weight
    return [sorted(set(hand)) for hand in hands]


def by_eplb(load: Loads, rooms: Sequence[Room], slots: int) -> Placement:
    layers = [eplb(layer, len(rooms), slots) for layer in load]
    placed = tuple(
        PlacedWorker(
            room.member, room.address, tuple((i, e) for i, hands in enumerate(layers) for e in hands[index])
        )
        for index, room in enumerate(rooms)
    )
    return Placement(_EPOCH, "bench", len(load), load.shape[1], placed)


# --- comparing -------------------------------------------------------------------------------------


def compare(case: Case) -> list[Outcome]:
    """Dealt at first, then balanced by either; and balanced again by ours, which should move nothing."""
    half = len(case.ids) // 2
    load = load_of(case, case.ids[:half])
    layers, experts = load.shape
    slots = even_slots(1, experts, 1, case.workers, case.spare)
    rooms = [
        Room(Member(f"expert-{i}", 1), "", "host", even_slots(layers, experts, 1, case.workers, case.spare))
        for i in range(case.workers)
    ]
    dealt = spread(_EPOCH, "bench", [(room.member, "") for room in rooms], layers, experts, 1)
    began_s = time.perf_counter()
    greedy = by_eplb(load, rooms, slots)
    greedy_s, began_s = time.perf_counter() - began_s, time.perf_counter()
    ours = place(_EPOCH, "bench", rooms, load, dealt, Policy())
    ours_s, began_s = time.perf_counter() - began_s, time.perf_counter()
    again = place(_EPOCH, "bench", rooms, load, ours, Policy())
    again_s = time.perf_counter() - began_s
    found = []
    for who, placement, before, seconds in (
        ("dealt", dealt, dealt, 0.0),
        ("EPLB", greedy, dealt, greedy_s),
        ("ours", ours, dealt, ours_s),
        ("ours again", again, ours, again_s),
    ):
        table = Table(rooms, load, 1, placement, None)
        measured = planned(placement, case.ids[half:])
        reads, step, rows = (round(figure, 3) for figure in measured)
        moves, modelled = num_moves(before, placement), round(table.busiest / table.mean, 3)
        figures = (modelled, reads, step, rows, round(seconds, 3))
        found.append(Outcome(case.name, case.workers, slots, who, moves, *figures))
    return found


def num_moves(before: Placement, after: Placement) -> int:
    """Experts that some worker must load."""
    held = {worker.member: set(worker.experts) for worker in before.workers}
    return sum(len(set(worker.experts) - held[worker.member]) for worker in after.workers)


def planned(placement: Placement, ids: Ids) -> tuple[float, float, float]:
    """As `router.plan` divides these microbatches: reads, reads of single microbatches, rows."""
    reads, rows = np.zeros((2, ids.shape[1], len(placement.workers)))
    steps = []
    for microbatch in ids:
        step = np.zeros_like(reads)
        for layer, chosen in enumerate(microbatch):
            routes = Routes(torch.from_numpy(chosen), torch.ones(chosen.shape))
            for parcel in plan(routes, placement, layer).parcels:
                step[layer, parcel.worker] += len(parcel.route_experts.unique())
                rows[layer, parcel.worker] += len(parcel.route_experts)
        reads += step
        steps.append(_busiest(step))
    return _busiest(reads), float(np.mean(steps)), _busiest(rows)


def _busiest(loads: Loads) -> float:
    """loads [L, W]: the busiest worker's by the mean, summed over layers."""
    return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())


def cases(tokens: int, batches: int, seed: int, demo: bool, wide: bool) -> list[Case]:
    exponents = (0.0, 0.5, 1.0, 1.5)
    found = []
    if demo:
        ids = of_the_demo(tokens, batches, seed)
        found += [Case("demo", workers, 2, ids, 16) for workers in (3, 4)]
    for exponent in exponents:
        name = f"Zipf {exponent:g}" if exponent else "uniform"
        ids = drawn(exponent, 12, 64, 8, tokens, batches, seed)
        found += [Case(f"64 experts, {name}", 4, 4, ids, 64)]
    if wide:
        ids = drawn(1.0, 62, 256, 8, tokens, min(batches, 20), seed)
        found += [Case("62 x 256 experts, Zipf 1", workers, 4, ids, 256) for workers in (8, 32, 64)]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench balancer", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=32, help="of a microbatch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=100, help="half seen, half planned (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-demo", action="store_true", help="without the demo model's own routes")
    parser.add_argument("--no-wide", action="store_true", help="without 62 layers of 256 experts")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    asked = cases(options.tokens, options.batches, options.seed, not options.no_demo, not options.no_wide)
    found = [outcome for case in asked for outcome in compare(case)]
    if options.json:
        print(json.dumps({"target": TARGET, "outcomes": [dataclasses.asdict(outcome) for outcome in found]}))
        return 0
    heads = ("case", "workers", "slots", "by", "moves", "modelled", "reads", "step", "rows", "time")
    print("{:<26} {:>7} {:>5}  {:<10} {:>6} {:>8} {:>6} {:>6} {:>6} {:>8}".format(*heads))
    for o in found:
        balance = f"{o.modelled:>8.3f} {o.reads:>6.3f} {o.step:>6.3f} {o.rows:>6.3f} {o.seconds:>6.2f} s"
        print(f"{o.case:<26} {o.workers:>7} {o.slots:>5}  {o.who:<10} {o.moves:>6} {balance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which expert goes to which worker, with few moves: what a worker holds it keeps, as far as shares stay even.

Knows no loads. Every layer is shared out evenly, to within one slot of each worker, and so is the whole model; the
replicas of an expert are on distinct workers. Pure, and a fixed point: arranged again, nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.placement import PlacedWorker, Placement, spread

Held = dict[str, set[int]]  # by worker id: experts of one layer


def arrange(before: Placement | None, wanted: Placement, replicas: int) -> Placement:
    """`wanted`: epoch, shape, and the workers to place experts on; their slots are ignored. `replicas`: at most
    their number. `before`: what is in use. A worker's next life takes the slots of the one before."""
    members = [(worker.member, worker.address) for worker in wanted.workers]
    dealt = spread(
        wanted.epoch, wanted.fingerprint, members, wanted.num_layers, wanted.num_experts, replicas
    )  # its shares are even: only how many each holds of a layer is taken from it
    if before is None:
        return dealt
    held_before = _by_layer(before)
    hands: dict[str, list[tuple[int, int]]] = {worker.member.id: [] for worker in wanted.workers}
    for layer, shares in enumerate(_by_layer(dealt)):
        quotas = {worker: len(experts) for worker, experts in shares.items()}
        held = _share_out(held_before[layer], quotas, wanted.num_experts, replicas)
        for worker, experts in held.items():
            hands[worker] += [(layer, expert) for expert in sorted(experts)]
    workers = tuple(PlacedWorker(w.member, w.address, tuple(hands[w.member.id])) for w in wanted.workers)
    arranged = Placement(wanted.epoch, wanted.fingerprint, wanted.num_layers, wanted.num_experts, workers)
    arranged.validate()
    return arranged


def num_moves(before: Placement, after: Placement) -> int:
    """Slots of `after` that its workers do not hold in `before`: experts to be loaded."""
    held = {worker.member: set(worker.experts) for worker in before.workers}
    return sum(len(set(worker.experts) - held.get(worker.member, set())) for worker in after.workers)


def _by_layer(placement: Placement) -> list[Held]:
    layers: list[Held] = [{w.member.id: set() for w in placement.workers} for _ in range(placement.num_layers)]
    for worker in placement.workers:
        for layer, expert in worker.experts:
            layers[layer][worker.member.id].add(expert)
    return layers


def _share_out(before: Held, quotas: Mapping[str, int], num_experts: int, replicas: int) -> Held:
    """Every expert `replicas` times, each worker its quota: first what it held, then what is missing."""
    missing = dict.fromkeys(range(num_experts), replicas)
    held: Held = {worker: set() for worker in quotas}
    for worker, quota in quotas.items():
        # Those with fewest holders first: the others are to be had elsewhere.
        holders = {e: sum(e in other for other in before.values()) for e in before.get(worker, ())}
        for expert in sorted(holders, key=lambda e: (holders[e], e)):
            if missing[expert] and len(held[worker]) < quota:
                held[worker].add(expert)
                missing[expert] -= 1
    for expert in sorted(missing, key=lambda e: -missing[e]):  # who needs most workers first: they must differ
        for _ in range(missing[expert]):
            _place(expert, held, quotas, before)
    return held


def _place(expert: int, held: Held, quotas: Mapping[str, int], before: Held) -> None:
    """With whoever has most room. Where all who have room hold it already, one of them takes something else from a
    worker that does not: as shares are even, such a worker has something that the other lacks. Preferably
    something that has moved anyway."""
    room = {worker: quotas[worker] - len(experts) for worker, experts in held.items()}
    able = [worker for worker, free in room.items() if free > 0 and expert not in held[worker]]
    if able:
        held[max(able, key=lambda worker: room[worker])].add(expert)
        return
    roomy = next(worker for worker, free in room.items() if free > 0)
    swaps = [
        (moved in before.get(worker, ()), moved not in before.get(roomy, ()), worker, moved)
        for worker, experts in held.items()
        if expert not in experts
        for moved in experts - held[roomy]
    ]
    _, _, other, moved = min(swaps)
    held[other] = held[other] - {moved} | {expert}
    held[roomy].add(moved)

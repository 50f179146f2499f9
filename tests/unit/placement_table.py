"""Reading a placement's table, for tests."""

from __future__ import annotations

from router.placement import Placement


def holders(placement: Placement, layer: int, expert: int) -> tuple[int, ...]:
    """Indices in `workers` of those that hold it, in the table's order."""
    return tuple(worker for worker in placement.holder_table[layer, expert].tolist() if worker >= 0)


def num_moves(before: Placement, after: Placement) -> int:
    """Slots of `after` that its workers do not hold in `before`: experts to be loaded."""
    held = {worker.member: set(worker.experts) for worker in before.workers}
    return sum(len(set(worker.experts) - held.get(worker.member, set())) for worker in after.workers)

"""Reading a placement's table, for tests."""

from __future__ import annotations

from router.placement import Placement


def holders(placement: Placement, layer: int, expert: int) -> tuple[int, ...]:
    """Indices in `workers` of those that hold it, in the table's order."""
    return tuple(worker for worker in placement.holder_table[layer, expert].tolist() if worker >= 0)

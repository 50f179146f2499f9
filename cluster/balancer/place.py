"""Load, workers and the placement there is -> the placement there should be, by few moves. Pure, deterministic.

First what must be (`cover`), whatever it takes; what has to be loaded for that goes where it balances best. Then,
within a budget, what helps: the layer that loses most time to its busiest worker comes first, and there the step
that relieves this worker most. Rearranging comes before replicating: an expert is copied only where the best move
or exchange would leave more than half of the busiest worker's surplus, for a copy takes a slot for good and an
exchange takes none.

Then spare slots that are still empty get copies, of the busiest experts first. On average that may gain nothing,
but it gives `router.plan` a choice in each microbatch, of which no two ask for the same experts.

It does not swing: a layer within `slack` of its mean is left alone, and unless the whole gains at least `gain_min`
nothing is done but to fill empty slots; both in units of a perfectly balanced pool's time. So load must shift by
more than `gain_min` to move anything, and what is balanced and full stays.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.balancer.cover import add_copies, cover
from cluster.balancer.layer import Found, Loads
from cluster.balancer.search import search
from cluster.balancer.table import Room, Table
from router.errors import PlacementError
from router.placement import EpochId, Placement

_PRIOR = 0.01  # of a layer's mean load: what an expert that was never asked for counts as
_WORTH = 0.001  # of a layer's mean load: a step gains at least so much for each expert loaded


@dataclass(frozen=True)
class Policy:
    replicas: int = 1
    """Holders of every expert, for safety, where slots allow."""
    moves_max: int | None = None
    """Experts loaded at most to balance the pool, beyond what covering takes. None: as many as help."""
    slack: float = 0.03
    """A layer whose busiest worker does at most so much more than the mean is balanced."""
    gain_min: float = 0.05
    """Of a balanced pool's time: less is not worth a new epoch."""


def place(
    epoch: EpochId,
    fingerprint: str,
    rooms: Sequence[Room],
    load: Loads,
    current: Placement | None,
    policy: Policy,
    together: Loads | None = None,
) -> Placement:
    """load [L, E], of any unit that adds up; all zero: not known, and all the same. `current`: what workers hold
    now, lost ones included. `together` [L, E, E]: how often one token asked for both experts, where it is known.

    Raises PlacementError when the slots cannot hold every expert once.
    """
    if not rooms:
        raise PlacementError("rooms: none; accepted: at least one expert worker")
    table = Table(rooms, _smoothed(load), policy.replicas, current, together)
    cover(table)
    improve(table, policy.slack, 0)
    before, covered = table.busiest, table.held.copy()
    left = sys.maxsize if policy.moves_max is None else policy.moves_max
    if load.any():
        _balance(table, policy.slack, left)
        if before - table.busiest < policy.gain_min * table.mean:
            table.replace_all(covered)
            add_copies(table, left)
            if table.busiest > max(before, (1 + policy.slack) * table.mean):
                table.replace_all(covered)
    return table.placement(epoch, fingerprint, current)


def _balance(table: Table, slack: float, left: int) -> None:
    left = improve(table, slack, left)
    improve(table, slack, add_copies(table, left))


def improve(table: Table, slack: float, left: int) -> int:
    """Take steps until every layer is balanced, none helps, or `left` experts are to be loaded: how many are left.
    What is to be loaded anyway may go elsewhere for nothing."""
    has_changed = True
    while has_changed:
        has_changed = False
        waiting = [(layer.mean - layer.busiest, index) for index, layer in enumerate(table.layers)]
        heapq.heapify(waiting)
        while waiting:
            _, index = heapq.heappop(waiting)
            layer = table.layers[index]
            if layer.busiest <= (1 + slack) * layer.mean:
                continue
            cost = _improve_layer(table, index, left)
            if cost is not None:
                left -= cost
                has_changed = True
                heapq.heappush(waiting, (layer.mean - layer.busiest, index))
    return left


def _improve_layer(table: Table, index: int, left: int) -> int | None:
    """What it costs in loads; None: nothing was done, for nothing helps enough."""
    layer = table.layers[index]
    found = _best_step(table, index, left)
    if found is not None:
        cost = layer.cost(found.step)
        table.apply(index, found.step, found.amounts)
        return cost
    better = search(layer, table.slots - table.used, left) if left > 0 else None
    if better is None:
        return None
    before = layer.num_loads
    table.replace(index, better)
    return layer.num_loads - before


def _best_step(table: Table, index: int, left: int) -> Found | None:
    layer = table.layers[index]
    source = int(np.argmax(layer.levels))
    rearranged = layer.best_rearrangement(source, table.has_room, left)
    best = rearranged
    if left > 0 and (rearranged is None or rearranged.ends > (layer.busiest + layer.mean) / 2):
        copied = layer.best_copy(source, table.has_room)
        if copied is not None and (rearranged is None or copied.ends < rearranged.ends):
            best = copied
    if best is None or layer.busiest - best.ends < _WORTH * layer.mean * max(layer.cost(best.step), 0):
        return None
    return best


def _smoothed(load: Loads) -> Loads:
    """[L, E], with a little for experts never asked for, so that they are spread too."""
    mean = load.mean(axis=1, keepdims=True)
    return np.where(mean > 0, np.maximum(load, _PRIOR * mean), 1.0)

"""What must be before anything is balanced: no worker holds more than its slots, every expert has a holder, and
as many of them as are asked for, on distinct hosts if there are several, where slots allow. Pure.
"""

from __future__ import annotations

import heapq

import numpy as np

from cluster.balancer.layer import Layer
from cluster.balancer.table import Table
from router.errors import PlacementError


def cover(table: Table) -> None:
    """Changes `table` as little as this takes. Raises PlacementError when workers cannot hold what they should."""
    _fill(table, 1)
    _fill(table, table.replicas)
    _empty(table)
    _fill(table, table.replicas)


def _fill(table: Table, replicas: int) -> None:
    """Holders for experts that have fewer than `replicas`, the busiest experts first."""
    wanting = [
        (-float(layer.load[expert]), index, expert)
        for index, layer in enumerate(table.layers)
        for expert in np.flatnonzero(layer.held.sum(axis=1) < replicas).tolist()
    ]
    levels = [_expected(layer, table.replicas) for layer in table.layers]  # as if all were there already
    touched = set()
    for _, index, expert in sorted(wanting):
        layer = table.layers[index]
        while int(layer.held[expert].sum()) < replicas:
            worker = _taker(table, index, expert, levels[index])
            if worker is None:
                if layer.held[expert].any():
                    break  # slots do not allow more
                worker = _make_room(table)
            layer.held[expert, worker] = True
            levels[index][worker] += layer.load[expert] / table.replicas
            table.used[worker] += 1
            touched.add(index)
    for index in touched:
        table.layers[index].refresh()


_SKEWED = 1.1
"""A layer whose busiest expert has so many times the load of its mean expert has use for copies."""


def add_copies(table: Table, left: int) -> int:
    """Fill empty slots with copies, at most `left`, of the experts with most load for each holder first: how many
    are left. A layer whose experts are about equally busy gets none."""
    hottest = [
        (-float(layer.load[expert]) / int(layer.held[expert].sum()), index, expert)
        for index, layer in enumerate(table.layers)
        if layer.load.max() > _SKEWED * layer.load.mean()
        for expert in range(len(layer.load))
    ]
    heapq.heapify(hottest)
    levels = [layer.levels.copy() for layer in table.layers]
    while hottest and left > 0 and table.has_room.any():
        load, index, expert = heapq.heappop(hottest)
        layer = table.layers[index]
        worker = _taker(table, index, expert, levels[index])
        if worker is None or layer.held[:, worker].sum() >= table.share[worker]:
            continue
        copies = int(layer.held[expert].sum())
        levels[index][layer.held[expert]] += load / (copies + 1)  # load is negative: about what they give away
        levels[index][worker] -= load * copies / (copies + 1)
        layer.held[expert, worker] = True
        table.used[worker] += 1
        left -= 1
        heapq.heappush(hottest, (load * copies / (copies + 1), index, expert))
    for layer in table.layers:
        layer.refresh()
    return left


def _expected(layer: Layer, replicas: int) -> np.ndarray:
    """[W]: levels if each holder had an equal part."""
    parts = layer.load / np.maximum(layer.held.sum(axis=1), replicas)
    return np.asarray(parts @ layer.held)


def _taker(table: Table, index: int, expert: int, levels: np.ndarray) -> int | None:
    """Who takes one more replica of an expert: on a host without one, within its share of this layer, one of the
    least busy (of a copy's takers, to within its load), who shares few experts with the other holders, and has
    most slots free. None: nobody can."""
    layer = table.layers[index]
    holders = layer.held[expert]
    able = np.flatnonzero(table.has_room & ~holders)
    if not able.size:
        return None
    is_copy = bool(holders.any())
    if is_copy and table.num_hosts > 1:
        able = _or_all(able, ~np.isin(table.hosts[able], table.hosts[holders]))
    held = layer.held[:, able]
    within = np.count_nonzero(held, axis=0) < table.share[able]
    near = layer.load[expert] / table.replicas if is_copy else 0.0
    low = within & (levels[able] <= levels[able][within].min(initial=np.inf) + near)
    low = low if low.any() else levels[able] <= levels[able].min() + near
    able, common = able[low], np.zeros(int(low.sum()))
    if is_copy:
        common += layer.held[:, holders].any(axis=1) @ held[:, low].astype(np.float64)
    if layer.together is not None:
        common += layer.together[expert] @ held[:, low] / max(float(layer.together.max()), 1.0)
    return int(able[np.lexsort((able, table.used[able] - table.slots[able], common))[0]])


def _or_all(able: np.ndarray, is_wanted: np.ndarray) -> np.ndarray:
    """Those that are wanted, or all if none is."""
    return able[is_wanted] if is_wanted.any() else able


def _make_room(table: Table) -> int:
    """A worker whose slot is freed of a replica, because another expert has no holder at all."""
    for index, layer in enumerate(table.layers):
        for expert in np.flatnonzero(layer.held.sum(axis=1) > 1).tolist():
            worker = int(np.flatnonzero(layer.held[expert])[0])
            table.drop(index, expert, worker)
            if table.has_room[worker]:
                return worker
    raise AssertionError("as many slots as experts, none held twice, and no room")


def _empty(table: Table) -> None:
    """Of workers that hold more than their slots: drop what others hold too, then move the rest to those with
    room, from the layer in which they do most."""
    for worker in np.flatnonzero(table.used > table.slots).tolist():
        spare = table.surplus(worker)
        while table.used[worker] > table.slots[worker]:
            if spare:
                table.drop(*spare.pop(0), worker)
            else:
                _move_one(table, worker)


def _move_one(table: Table, worker: int) -> None:
    def fullness(index: int) -> tuple[float, int]:
        layer = table.layers[index]
        return -float(layer.levels[worker]) / max(layer.mean, 1e-300), index

    for index in sorted(range(len(table.layers)), key=fullness):
        step = table.layers[index].best_move(worker, table.has_room)
        if step is not None:
            table.apply(index, step)
            return
    for index, layer in enumerate(table.layers):
        for expert in np.flatnonzero(layer.held[:, worker] & (layer.held.sum(axis=1) > 1)).tolist():
            table.drop(index, expert, worker)
            return
    raise PlacementError(
        f"slots: {table.slots[worker]} of {table.rooms[worker].member.id!r}, which holds {table.used[worker]} "
        "experts that no other worker has room for; accepted: more slots"
    )

"""What must be before anything is balanced: no worker holds more than its slots, every expert has a holder, and
as many of them as are asked for, on distinct hosts if there are several, where slots allow; and who is new has a
share. Pure.
"""

from __future__ import annotations

import heapq

import numpy as np

from cluster.balancer.layer import Layer, Loads, Step
from cluster.balancer.table import Table
from router.errors import PlacementError


def cover(table: Table) -> None:
    """Changes `table` as little as this takes. Raises PlacementError when workers cannot hold what they should."""
    _fill(table, 1)
    _fill(table, table.replicas)
    _welcome(table)
    _empty(table)
    _fill(table, table.replicas)
    _part(table)


# Holders for those that lack them.


def _fill(table: Table, replicas: int) -> None:
    """Holders for experts that have fewer than `replicas`, the busiest experts first."""
    wanting = [
        (-float(layer.load[expert]), index, expert)
        for index, layer in enumerate(table.layers)
        for expert in np.flatnonzero(layer.held.sum(axis=1) < replicas).tolist()
    ]
    levels = [_expected(layer, table.replicas) for layer in table.layers]  # as if all were there already
    for _, index, expert in sorted(wanting):
        layer = table.layers[index]
        while int(layer.held[expert].sum()) < replicas:
            worker = _taker(table, index, expert, levels[index])
            if worker is not None:
                layer.held[expert, worker] = True
                levels[index][worker] += layer.load[expert] / table.replicas
                table.used[worker] += 1
            elif not _free_a_slot(table, index, expert):
                break  # slots do not allow more
    if wanting:
        for layer in table.layers:
            layer.refresh()


def _expected(layer: Layer, replicas: int) -> Loads:
    """[W]: levels if each holder had an equal part."""
    parts = layer.load / np.maximum(layer.held.sum(axis=1), replicas)
    return np.asarray(parts @ layer.held)


def _taker(table: Table, index: int, expert: int, levels: Loads) -> int | None:
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
        able = _or_all(able, ~table.on_host[:, table.hosts[holders]].any(axis=1)[able])
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


def _free_a_slot(table: Table, index: int, expert: int) -> bool:
    """Where all who have room hold this expert already: whether another has room now, or is closer to having it.

    A replica too many is given up; or something goes on to one who has room; or a replica of another expert is
    given up, because this one has no holder at all."""
    holders = table.layers[index].held[expert]
    surplus = [
        (bool(holders[worker]), *pair, worker)
        for worker in np.flatnonzero(~table.has_room | ~holders).tolist()
        for pair in table.surplus(worker)[:1]
    ]
    if surplus and not min(surplus)[0]:
        table.drop(*min(surplus)[1:])
        return True
    if _pass_on(table, index, expert):
        return True
    if surplus:
        table.drop(*min(surplus)[1:])
        return True
    if holders.any():
        return False
    for at, layer in enumerate(table.layers):
        for other in np.flatnonzero(layer.held.sum(axis=1) > 1).tolist():
            table.drop(at, other, int(np.flatnonzero(layer.held[other])[0]))
            return True
    raise AssertionError("as many slots as experts, none held twice, and no room")


def _pass_on(table: Table, index: int, expert: int) -> bool:
    """Something goes from one without this expert to one who holds it and has room: preferably something of the
    same layer, about as busy, that may do so without parting it from its hosts."""
    layer = table.layers[index]
    on_hosts = layer.on_hosts()[expert]
    part = layer.load[expert] / table.replicas
    best: tuple[tuple[bool, bool, bool, float], int, Step] | None = None
    for target in np.flatnonzero(table.has_room).tolist():
        for source in np.flatnonzero(~layer.held[expert]).tolist():
            joins = bool(on_hosts[table.hosts[source]])
            for at, other in np.argwhere(table.held[:, :, source] & ~table.held[:, :, target]).tolist():
                differs = abs(float(table.layers[at].amounts[other, source]) - part)
                key = (not table.layers[at].may_move(other, source, target), joins, at != index, differs)
                if best is None or key < best[0]:
                    best = key, at, Step(other, source, target)
    if best is not None:
        table.apply(best[1], best[2])
    return best is not None


# Who has just come.


def _welcome(table: Table) -> None:
    """Each newcomer takes an even share of what must be, however much room the others have for it."""
    even = table.held.shape[0] * table.held.shape[1] * table.replicas // len(table.rooms)
    for worker in np.flatnonzero(table.is_new).tolist():
        while table.used[worker] < min(even, table.slots[worker]) and _take_one(table, worker, even):
            pass


def _take_one(table: Table, worker: int, even: int) -> bool:
    """In the layer in which it does least; of who has more than `even`: what needs another host, else of the
    busiest what evens out both best."""
    levels = [float(layer.levels[worker]) / max(layer.mean, 1e-300) for layer in table.layers]
    for index in np.argsort(levels, kind="stable").tolist():
        layer = table.layers[index]
        can = layer.held & ~layer.held[:, worker][:, None] & (table.used > even) & layer.may_come(worker)
        experts, sources = np.nonzero(can)
        if experts.size:
            amounts = layer.amounts[experts, sources]
            after = np.maximum(layer.levels[sources] - amounts, layer.levels[worker] + amounts)
            gains = layer.hosts_lacking()[experts] & ~layer.on_hosts()[experts, table.hosts[worker]]
            is_full = (table.used > table.slots)[sources]
            best = np.lexsort((experts, sources, after, -layer.levels[sources], ~gains, ~is_full))[0]
            table.apply(index, Step(int(experts[best]), int(sources[best]), worker))
            return True
    return False


# Who holds too much.


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


# Hosts.


def _part(table: Table) -> None:
    """Replicas that are together on a host while another has none: one goes there, into a slot that is free or in
    exchange for something that does not need to be there, preferably of the same layer."""
    if table.num_hosts == 1:
        return
    for index, layer in enumerate(table.layers):
        for expert in np.flatnonzero(layer.hosts_lacking()).tolist():
            layers = [index, *(at for at in range(len(table.layers)) if at != index)]
            any(_part_one(table, index, expert, at) for at in layers)


def _part_one(table: Table, index: int, expert: int, other_layer: int) -> bool:
    """A move or an exchange of the least change in levels; whether there was one."""
    layer, other = table.layers[index], table.layers[other_layer]
    at_host = np.bincount(table.hosts, layer.held[expert], table.num_hosts)[table.hosts]  # [W]
    found: list[tuple[bool, float, int, int, int]] = []  # is an exchange, change, source, target, other expert
    for source in np.flatnonzero(layer.held[expert] & (at_host > 1)).tolist():
        amount = float(layer.amounts[expert, source])
        free = np.flatnonzero((at_host == 0) & table.has_room).tolist()
        found += [(False, amount, source, target, -1) for target in free]
        can = other.held & ~other.held[:, source][:, None] & (at_host == 0) & other.may_come(source)
        for exchanged, target in np.argwhere(can).tolist():
            found.append((True, abs(float(other.amounts[exchanged, target]) - amount), source, target, exchanged))
    if not found:
        return False
    _, _, source, target, exchanged = min(found)
    if exchanged >= 0:
        table.apply(other_layer, Step(exchanged, target, source))
    table.apply(index, Step(expert, source, target))
    return True


# Copies for load.

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

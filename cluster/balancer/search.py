"""For a small layer in which no single step helps: several together, the most promising first. Pure.

A best-first search over what a few copies, drops, moves and exchanges lead to, bounded in the placements it
looks at. Where these are all there are, what it finds is optimal.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from cluster.balancer.layer import Flags, Layer, Loads, divide

CELLS_MAX = 64
"""Experts x workers of a layer that is searched. In larger ones single steps get close enough to the mean."""
LOOKS_MAX = 1000

_LEAST = 1e-9


def search(layer: Layer, free: np.ndarray, left: int) -> Flags | None:
    """The first placement found [E, W] whose busiest worker does less, for at most `left` loads more.

    free [W]: slots. None: there is none, or it was not found.
    """
    if layer.held.size > CELLS_MAX:
        return None
    loads_max = layer.num_loads + left
    start, wanted = layer.held, layer.busiest * (1 - _LEAST)
    room = free + start.sum(axis=0)  # [W]: slots of this layer
    waiting = [(_badness(divide(layer.load, start)), 0, start)]
    seen = {start.tobytes()}
    while waiting:
        _, _, held = heapq.heappop(waiting)
        for new in _neighbours(held):
            key = new.tobytes()
            if key in seen or (new.sum(axis=0) > room).any() or (new & ~layer.had).sum() > loads_max:
                continue
            if not layer.is_as_safe(new):
                continue
            seen.add(key)
            badness = _badness(divide(layer.load, new))
            if badness[0] < wanted:
                return new
            if len(seen) > LOOKS_MAX:
                return None
            heapq.heappush(waiting, (badness, len(seen), new))
    return None


def _neighbours(held: Flags) -> Iterator[Flags]:
    """Each copy, drop, move and exchange."""
    for expert, source in np.argwhere(held).tolist():
        for target in np.flatnonzero(~held[expert]).tolist():
            copied = held.copy()
            copied[expert, target] = True
            yield copied
            moved = copied.copy()
            moved[expert, source] = False
            yield moved
            for other in np.flatnonzero(held[:, target] & ~held[:, source]).tolist():
                exchanged = moved.copy()
                exchanged[other, target], exchanged[other, source] = False, True
                yield exchanged
        if held[expert].sum() > 1:
            dropped = held.copy()
            dropped[expert, source] = False
            yield dropped


def _badness(amounts: Loads) -> tuple[float, float]:
    levels = amounts.sum(axis=0)
    return float(levels.max()), float(np.square(levels).sum())

"""Joins parcels of one layer that are waiting, from any attention workers: a bounded wait, never a barrier.

Attention workers ask for one layer after the other, and how long each took between them the last time is known.
So it is known who will soon ask for a layer too: a parcel is held for those expected within `join_wait_s` of its
coming, so that all become one computation, which reads each expert's weights once. Who is not there after twice
its time is not waited for. Nothing is held for longer than `join_wait_s`, nothing while another parcel is ripe,
and nothing at all when one attention worker is alone.

Fair: peers lead batches in turn, each with its oldest parcel. So a ripe parcel with k of its own peer's before it
is in one of the next (k + 1) x peers batches, whatever the others send. What joins a batch does not cost a turn.

Pure: time is an argument.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from router.placement import Member
from router.transport.base import Parcel


@dataclass(frozen=True)
class _Waiting:
    parcel: Parcel
    since_s: float


@dataclass
class _Peer:
    layer: int  # of its last parcel
    came_s: float
    takes_s: dict[int, float] = field(default_factory=dict)  # by layer: from the parcel of the one before


_FORGET_S = 60.0  # silent for so long, a peer is new again


class Batcher:
    def __init__(self, num_layers: int, rows_max: int, parcels_max: int, join_wait_s: float) -> None:
        """`rows_max`: routes of one batch, unless one parcel alone has more. `parcels_max`: when so many wait,
        none is held any more."""
        self.num_layers = num_layers
        self.rows_max = rows_max
        self.parcels_max = parcels_max
        self.join_wait_s = join_wait_s
        self._waiting: OrderedDict[Member, list[_Waiting]] = OrderedDict()  # oldest first; peers in turn
        self._peers: dict[Member, _Peer] = {}
        self._len = 0

    def __len__(self) -> int:
        return self._len

    @property
    def is_full(self) -> bool:
        return self._len >= self.parcels_max

    def add(self, parcel: Parcel, now_s: float) -> None:
        self._follow(parcel, now_s)
        self._waiting.setdefault(parcel.sender, []).append(_Waiting(parcel, now_s))
        self._len += 1

    def _follow(self, parcel: Parcel, now_s: float) -> None:
        peer = self._peers.setdefault(parcel.sender, _Peer(parcel.layer, now_s))
        if parcel.layer == self._after(peer.layer):
            peer.takes_s[parcel.layer] = now_s - peer.came_s
        peer.layer, peer.came_s = parcel.layer, now_s
        for gone in [member for member, peer in self._peers.items() if peer.came_s < now_s - _FORGET_S]:
            del self._peers[gone]

    def _after(self, layer: int) -> int:
        return (layer + 1) % self.num_layers

    def wait_s(self, now_s: float) -> float | None:
        """How long nothing will be ripe unless more comes: 0 if something is. None: nothing waits."""
        if not self._len:
            return None
        return max(0.0, min(self._ripe_s(queue[0], now_s) for queue in self._waiting.values()) - now_s)

    def next_batch(self, now_s: float) -> list[Parcel]:
        """The oldest parcel of the next peer in turn whose parcel is ripe, and what waits for the same layer, one
        of each peer after another, up to `rows_max` routes. Empty when nothing is ripe."""
        ripe = (peer for peer, queue in self._waiting.items() if self._ripe_s(queue[0], now_s) <= now_s)
        leader = next(ripe, None)
        if leader is None:
            return []
        self._waiting.move_to_end(leader, last=False)
        batch = self._fitting(self._waiting[leader][0].parcel.layer)
        self._waiting.move_to_end(leader)
        for taken in batch:
            self._remove(taken)
        return [taken.parcel for taken in batch]

    def _ripe_s(self, waiting: _Waiting, now_s: float) -> float:
        """When this parcel is no longer held: now, or when the last peer that is expected to join it is late."""
        layer, end_s = waiting.parcel.layer, waiting.since_s + self.join_wait_s
        late_s = [
            2 * expected_s - peer.came_s
            for member, peer in self._peers.items()
            if (expected_s := self._expected_s(peer, layer, end_s)) is not None and not self._has(member, layer)
        ]
        return now_s if self.is_full else min(max(late_s, default=now_s), end_s)

    def _expected_s(self, peer: _Peer, layer: int, end_s: float) -> float | None:
        """When its next parcel of this layer comes, going by the last time; None: after `end_s`, or unknown."""
        at, expected_s = peer.layer, peer.came_s
        while expected_s <= end_s:
            at = self._after(at)
            expected_s += peer.takes_s.get(at, math.inf)
            if at == layer:
                break
        return expected_s if expected_s <= end_s else None

    def _has(self, peer: Member, layer: int) -> bool:
        return any(waiting.parcel.layer == layer for waiting in self._waiting.get(peer, ()))

    def _fitting(self, layer: int) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        full: set[Member] = set()  # whose next one does not fit: none of theirs overtakes it
        for waiting in self._in_rounds(layer):
            sender, routes = waiting.parcel.sender, len(waiting.parcel.route_rows)
            if batch and rows + routes > self.rows_max:
                full.add(sender)
            elif sender not in full:
                batch.append(waiting)
                rows += routes
        return batch

    def _in_rounds(self, layer: int) -> Iterator[_Waiting]:
        """What waits for a layer: the oldest of each peer in turn, then the next of each."""
        queues = [[w for w in queue if w.parcel.layer == layer] for queue in self._waiting.values()]
        for one_of_each in zip_longest(*queues):
            yield from (waiting for waiting in one_of_each if waiting is not None)

    def _remove(self, taken: _Waiting) -> None:
        queue = self._waiting[taken.parcel.sender]
        queue[:] = [waiting for waiting in queue if waiting is not taken]
        self._len -= 1
        if not queue:
            del self._waiting[taken.parcel.sender]

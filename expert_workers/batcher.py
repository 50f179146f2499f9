"""Joins parcels of one layer that are waiting, from any attention workers. Never waits for one: no barrier.

Pure: holds parcels, no clock. A peer that sends much does not crowd out others, because the exchange hands
out parcels in turn and a batch takes whole parcels in that order.
"""

from __future__ import annotations

from collections import deque

from router.transport.base import Parcel


class Batcher:
    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self._waiting: deque[Parcel] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, parcel: Parcel) -> None:
        self._waiting.append(parcel)

    def next_batch(self) -> list[Parcel]:
        """The oldest parcel and every waiting one of its layer, up to rows_max routes; at least one parcel."""
        batch: list[Parcel] = []
        rest: deque[Parcel] = deque()
        rows = 0
        for parcel in self._waiting:
            fits = not batch or (parcel.layer == batch[0].layer and rows + len(parcel.route_rows) <= self.rows_max)
            if fits:
                batch.append(parcel)
                rows += len(parcel.route_rows)
            else:
                rest.append(parcel)
        self._waiting = rest
        return batch

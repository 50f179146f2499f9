"""Which waiting sequence goes to which worker now. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping

from cluster.scheduler.events import Incarnation
from cluster.scheduler.waiting import Waiting
from cluster.scheduler.workers import WorkerBook


def choose(
    queue: Iterable[Waiting], workers: Mapping[Incarnation, WorkerBook], plan_bytes_max: int
) -> Iterator[tuple[Waiting, WorkerBook]]:
    """Each goes to the least loaded worker with room for it; among equals to the one with most room.

    The caller starts what it is given before it asks for more. Strictly in the queue's order: one that
    must wait for room keeps those behind it waiting, so that no long prompt starves; only one that no
    present worker could ever hold is passed over.
    """
    heap = [_rank(book) for book in workers.values() if book.accepts()]
    heapq.heapify(heap)
    for entry in queue:
        if not heap:
            return
        passed = []
        chosen = None
        while heap and chosen is None:
            rank = heapq.heappop(heap)
            book = workers[rank[2]]
            if book.takes(entry, plan_bytes_max):
                chosen = book
            else:
                passed.append(rank)
        for rank in passed:
            heapq.heappush(heap, rank)
        if chosen is not None:
            yield entry, chosen
            if chosen.accepts():
                heapq.heappush(heap, _rank(chosen))
        elif any(book.could_ever_hold(entry) for book in workers.values()):
            return


def _rank(book: WorkerBook) -> tuple[int, int, Incarnation]:
    return (len(book.held), -book.room().full, book.worker)

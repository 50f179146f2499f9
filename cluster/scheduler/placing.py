"""Which waiting sequence goes to which worker now. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping

from cluster.scheduler.events import Incarnation
from cluster.scheduler.waiting import Waiting
from cluster.scheduler.workers import WorkerBook


def choose(
    queue: Iterable[Waiting], workers: Mapping[Incarnation, WorkerBook], plan_bytes_max: int
) -> Iterator[tuple[Waiting, WorkerBook, int]]:
    """Each goes to the least loaded worker with room for it, among equals to the one with most room; or to one
    that has more of its prompt cached, unless the wait there outweighs what that saves. The number: its tokens
    that are expected to be cached.

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
            if not book.accepts():
                continue  # was given its last for a prefix, since it was ranked
            if rank != _rank(book):
                heapq.heappush(heap, _rank(book))
            elif book.takes(entry, plan_bytes_max):
                chosen = book
                passed.append(rank)
            else:
                passed.append(rank)
        for rank in passed:
            heapq.heappush(heap, rank)
        if chosen is not None:
            num_cached = 0
            if len(workers) > 1:
                chosen, num_cached = _with_prefix(entry, chosen, workers, plan_bytes_max)
                chosen.expect(entry)
            yield entry, chosen, num_cached
        elif any(book.could_ever_hold(entry) for book in workers.values()):
            return


def _rank(book: WorkerBook) -> tuple[int, int, Incarnation]:
    return (len(book.held), -book.room().full, book.worker)


def _with_prefix(
    entry: Waiting, chosen: WorkerBook, workers: Mapping[Incarnation, WorkerBook], plan_bytes_max: int
) -> tuple[WorkerBook, int]:
    """The worker that costs least of `chosen` and those with more cached, and the tokens cached there."""
    best, found = chosen, chosen.num_cached(entry)
    least, at_least = _cost(chosen, entry, found), found
    for book in workers.values():
        num_cached = book.num_cached(entry)
        if num_cached > at_least and book.accepts() and book.takes(entry, plan_bytes_max):
            cost = _cost(book, entry, num_cached)
            if cost < least:
                best, found, least = book, num_cached, cost
    return best, found


def _cost(book: WorkerBook, entry: Waiting, num_cached: int) -> int:
    """In rows: those the worker computes until the sequence has its first token, which are the prompts before it,
    its own, and the tokens decoded beside them; and its own once more, for all others wait for those."""
    own = entry.num_tokens - num_cached
    rows = book.rows_ahead + own
    return rows + len(book.held) * -(-rows // book.chunk_tokens_max) + own

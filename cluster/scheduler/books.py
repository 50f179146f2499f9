"""Who owns what and where: requests, their newest attempts, the queue, the workers' books.

Every move of a sequence is a method here, so that it is always in exactly one place: waiting, or at
one worker as its newest attempt. What has ended at the scheduler but not yet at its worker stays in the
worker's book as `stopping`. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    AttemptId,
    CloseAttempt,
    CloseReason,
    Incarnation,
    Running,
    Sibling,
    Submission,
)
from cluster.scheduler.placing import choose
from cluster.scheduler.shares import Shares
from cluster.scheduler.waiting import Waiting, WaitingQueue, due
from cluster.scheduler.workers import WorkerBook

ARRIVAL_BITS = 40  # of an arrival, for the count within one term


@dataclass(slots=True)
class Live:
    """The newest attempt of a sequence that has not ended."""

    attempt: AttemptId
    worker: Incarnation | None  # None: it waits


@dataclass(slots=True)
class Request:
    arrival: int
    gateway: Incarnation | None  # None: reported by a worker, claimed by no gateway yet
    sequences: dict[int, Live] = field(default_factory=dict)


class Books:
    def __init__(self, config: SchedulerConfig, term: int) -> None:
        self.requests: dict[str, Request] = {}
        self.shares = Shares(config.tenants_remembered_max)
        self.queue = WaitingQueue(self.shares)
        self.workers: dict[Incarnation, WorkerBook] = {}
        self.unclaimed: dict[str, float] = {}  # requests without a gateway: since when
        # By (request id, index): number and arrival of the last attempt that ended.
        self._ended: OrderedDict[tuple[str, int], tuple[int, int]] = OrderedDict()
        self._ended_max = config.ended_remembered_max
        self._config = config
        self._arrivals = term << ARRIVAL_BITS  # of one term follow all of the terms before

    def live(self, attempt: AttemptId) -> Live | None:
        """The newest attempt of this attempt's sequence."""
        request = self.requests.get(attempt.request_id)
        return request.sequences.get(attempt.index) if request else None

    def is_live(self, attempt: AttemptId) -> bool:
        live = self.live(attempt)
        return live is not None and live.attempt == attempt

    def runs_at(self, attempt: AttemptId, worker: Incarnation) -> bool:
        live = self.live(attempt)
        return live is not None and live.attempt == attempt and live.worker == worker

    def last_ended(self, attempt: AttemptId) -> int:
        """The number of its sequence's last attempt that has ended, as far as that is remembered; else 0."""
        return self._ended.get(attempt[:2], (0, 0))[0]

    def arrival_of(self, submission: Submission) -> int:
        """The arrival this request had before, where that is known; else a new one."""
        request = self.requests.get(submission.request_id)
        if request:
            return request.arrival
        before = [self._ended.get((submission.request_id, sibling.index)) for sibling in submission.siblings]
        known = [arrival for _, arrival in filter(None, before)]
        return min(known) if known else self._next_arrival()

    def waiting(
        self, gateway: Incarnation, submission: Submission, sibling: Sibling, arrival: int, now_s: float
    ) -> Waiting:
        """Its entry in the queue, had it one."""
        due_s = due(submission, now_s, self._config.priority_step_s, self._config.overtake_s_max)
        return Waiting(gateway, submission, sibling, arrival, now_s, due_s)

    def enqueue(self, entry: Waiting) -> None:
        submission, sibling = entry.submission, entry.sibling
        request = self.requests.setdefault(submission.request_id, Request(entry.arrival, entry.gateway))
        assert sibling.index not in request.sequences, f"{entry.attempt}: one attempt is still live"
        request.sequences[sibling.index] = Live(entry.attempt, None)
        self.queue.add(entry)

    def place(self, address_of: Callable[[Incarnation], str], plan_bytes_max: int) -> None:
        """From the queue to workers that have room. `address_of`: where a gateway takes its tokens."""
        placed = []
        for entry, book, num_cached in choose(self.queue, self.workers, plan_bytes_max):
            book.start(entry, address_of(entry.gateway), num_cached)
            self.requests[entry.submission.request_id].sequences[entry.sibling.index].worker = book.worker
            self.shares.charge(entry.submission.tenant, entry.cost)
            placed.append(entry)
        self.queue.remove_all(placed)

    def adopt(self, book: WorkerBook, running: Running, now_s: float) -> None:
        """A worker runs what its book has not. It goes on unless something newer is known.

        Where no gateway has claimed the request, the higher of two attempts wins; where one has, its own.
        """
        attempt = running.attempt
        live = self.live(attempt)
        book.adopt(running)
        if request := self.requests.get(attempt.request_id):
            request.arrival = min(request.arrival, running.arrival)  # claimed before this was heard
        if live is None and self.last_ended(attempt) < attempt.number:
            if attempt.request_id not in self.requests:
                self.requests[attempt.request_id] = Request(running.arrival, None)
                self.unclaimed[attempt.request_id] = now_s
            self.requests[attempt.request_id].sequences[attempt.index] = Live(attempt, book.worker)
        elif live is not None and live.attempt == attempt and live.worker is None:
            self.queue.remove(attempt)
            live.worker = book.worker
        elif live is not None and live.attempt < attempt and attempt.request_id in self.unclaimed:
            assert live.worker is not None, f"{live.attempt} waits, but for no gateway"
            self.workers[live.worker].stop(live.attempt)
            live.attempt, live.worker = attempt, book.worker
        else:
            book.stop(attempt)

    def claim(self, request_id: str, gateway: Incarnation) -> None:
        """What a worker was found running is this gateway's."""
        self.requests[request_id].gateway = gateway
        del self.unclaimed[request_id]

    def withdraw(self, attempt: AttemptId) -> None:
        """A live attempt is not wanted any more, wherever it is."""
        live = self.requests[attempt.request_id].sequences[attempt.index]
        if live.worker is not None:
            self.workers[live.worker].stop(attempt)
        self.end(attempt)

    def end(self, attempt: AttemptId) -> Incarnation | None:
        """A live attempt that did not finish is live no more, wherever it was.

        Remembered, so that it never runs again under its number. Returns its gateway, if one claimed it.
        """
        request = self.finish(attempt)
        self.remember(attempt, request.arrival)
        return request.gateway

    def finish(self, attempt: AttemptId) -> Request:
        """A live attempt has finished. Not remembered: its gateway has all of it (a completion means that),
        and would be given it again if it asked."""
        request_id, index, _ = attempt
        request = self.requests.pop(request_id)  # not a look and a deletion: one walk through cold memory
        sequences = request.sequences
        if sequences.pop(index).worker is None:
            self.queue.remove(attempt)
        if sequences:
            self.requests[request_id] = request
        elif request.gateway is None:
            del self.unclaimed[request_id]
        return request

    def close(self, attempt: AttemptId, reason: CloseReason, detail: str) -> Iterator[CloseAttempt]:
        """End a live attempt and tell its gateway."""
        gateway = self.end(attempt)
        if gateway is not None:
            yield CloseAttempt(gateway, attempt, reason, detail)

    def remember(self, attempt: AttemptId, arrival: int) -> None:
        self._ended[attempt[:2]] = (attempt.number, arrival)
        if len(self._ended) > self._ended_max:
            self._ended.popitem(last=False)

    def of_gateway(self, gateway: Incarnation) -> list[AttemptId]:
        """Live attempts of this gateway's requests, in order."""
        return sorted(
            live.attempt
            for request in self.requests.values()
            if request.gateway == gateway
            for live in request.sequences.values()
        )

    def check(self) -> None:
        """Raises AssertionError unless every sequence is in exactly one place and counts agree."""
        waiting = {entry.attempt for entry in self.queue}
        assert len(waiting) == len(self.queue)
        self.queue.check()
        for request_id, request in self.requests.items():
            assert request.sequences, f"{request_id} has no sequences"
            for live in request.sequences.values():
                holders = [w for w, book in self.workers.items() if live.attempt in book.held]
                running = [w for w in holders if not self.workers[w].held[live.attempt].stopping]
                expected = [] if live.worker is None else [live.worker]
                assert running == expected, f"{live.attempt}: at {running}, expected {expected}"
                assert (live.attempt in waiting) == (live.worker is None), f"{live.attempt}: waiting?"
        assert all(self.is_live(attempt) for attempt in waiting)
        for book in self.workers.values():
            book.check()
            for attempt, held in book.held.items():
                assert held.stopping or self.is_live(attempt), f"{attempt} at {book.worker} is nobody's"
        assert self.unclaimed.keys() == {key for key, r in self.requests.items() if r.gateway is None}
        assert len(self._ended) <= self._ended_max

    @property
    def tokens_max(self) -> int:
        """The longest sequence some worker can run; 0: none has joined."""
        return max((book.limits.tokens_max for book in self.workers.values()), default=0)

    def what_is_missing(self) -> str:
        """What keeps present workers from taking anything at all, to be added to a refusal."""
        without = [str(worker) for worker, book in sorted(self.workers.items()) if book.experts_missing]
        return f"; experts are missing at {', '.join(without)}" if without else ""

    @property
    def num_starting(self) -> int:
        """Sequences that were placed and whose prompt is not done."""
        return sum(book.num_starting for book in self.workers.values())

    @property
    def rows_starting(self) -> int:
        """Rows that are left of those prompts."""
        return sum(book.rows_ahead for book in self.workers.values())

    @property
    def heard(self) -> set[Incarnation]:
        """Workers that have said what they run after they refused orders of older terms."""
        return {worker for worker, book in self.workers.items() if book.applied}

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

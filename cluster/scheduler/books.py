"""Who owns what and where: requests, their newest attempts, the queue, the workers' books.

Every move of a sequence is a method here, so that it is always in exactly one place: waiting, or at
one worker as its newest attempt. What has ended at the scheduler but not yet at its worker stays in the
worker's book as `stopping`. Pure.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    AttemptId,
    CloseAttempt,
    CloseReason,
    Incarnation,
    Running,
    SequenceKey,
    Sibling,
    Submission,
)
from cluster.scheduler.placing import choose
from cluster.scheduler.shares import Shares
from cluster.scheduler.waiting import Waiting, WaitingQueue, due
from cluster.scheduler.workers import Held, Starting, WorkerBook

DEADLINES_SLACK = 1024  # of requests that have ended, before they are swept out
COUNT_BITS = 40  # of an arrival or a handle, for the count within one term


@dataclass(slots=True)
class Request:
    arrival: int
    gateway: Incarnation | None  # None: reported by a worker, claimed by no gateway yet
    deadline_s: float = math.inf
    sequences: dict[int, Waiting | Held] = field(default_factory=dict)
    """By index: the newest attempt of each that has not ended, in the queue or at a worker."""


class Books:
    def __init__(self, config: SchedulerConfig, term: int) -> None:
        self.requests: dict[str, Request] = {}
        self.shares = Shares(config.tenants_remembered_max)
        self.queue = WaitingQueue(self.shares)
        self.workers: dict[Incarnation, WorkerBook] = {}
        self.starting = Starting()  # at all of them
        self.tokens_max = 0  # of the longest sequence that some worker can run; 0: none has joined
        self.unclaimed: dict[str, float] = {}  # requests without a gateway: since when
        # By (request id, index): number and arrival of the last attempt that ended.
        self._ended: OrderedDict[SequenceKey, tuple[int, int]] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []  # a heap; of requests that have ended some, too
        self._moving: dict[SequenceKey, WorkerBook] = {}  # taken off one worker, with room kept for it at another
        self._ended_max = config.ended_remembered_max
        self._config = config
        self._arrivals = self._handles = term << COUNT_BITS  # of one term follow all of the terms before

    def book_of(self, worker: Incarnation) -> WorkerBook:
        """What is known of it, or nothing yet."""
        config = self._config
        return self.workers.get(worker) or WorkerBook(
            worker, config.chunk_tokens_max, config.prefix_hints_max, self.starting
        )

    def add_worker(self, book: WorkerBook) -> None:
        """It has linked, perhaps not for the first time."""
        self.workers[book.worker] = book
        self._measure()

    def lose_worker(self, worker: Incarnation) -> WorkerBook:
        book = self.workers.pop(worker)
        self.starting.add(-book.num_starting, -book.rows_ahead)
        self._measure()
        return book

    def _measure(self) -> None:
        self.tokens_max = max((book.limits.tokens_max for book in self.workers.values()), default=0)

    def live(self, attempt: AttemptId) -> Waiting | Held | None:
        """The newest attempt of this attempt's sequence."""
        request = self.requests.get(attempt.request_id)
        return request.sequences.get(attempt.index) if request else None

    def is_live(self, attempt: AttemptId) -> bool:
        live = self.live(attempt)
        return live is not None and live.attempt == attempt

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
        entry = Waiting(gateway, submission, sibling, arrival, now_s)
        entry.due_s = due(entry, self._config.priority_step_s, self._config.overtake_s_max)
        return entry

    def enqueue(self, entry: Waiting) -> None:
        submission, sibling = entry.submission, entry.sibling
        request = self.requests.setdefault(submission.request_id, Request(entry.arrival, entry.gateway))
        self._bound(submission, request, entry.queued_s)
        assert sibling.index not in request.sequences, f"{entry.attempt}: one attempt is still live"
        request.sequences[sibling.index] = entry
        if to := self._moving.pop(entry.attempt[:2], None):
            to.give_room(entry.attempt[:2])
        self.queue.add(entry)

    def place(self, address_of: Callable[[Incarnation], str], plan_bytes_max: int) -> None:
        """From the queue to workers that have room. `address_of`: where a gateway takes its tokens."""
        placed = []
        for entry, book, num_cached in choose(self.queue, self.workers, plan_bytes_max):
            self._handles += 1
            held = book.start(entry, address_of(entry.gateway), num_cached, self._handles)
            self.requests[entry.submission.request_id].sequences[entry.sibling.index] = held
            self.shares.charge(entry.submission.tenant, entry.cost)
            placed.append(entry)
        self.queue.remove_all(placed)

    def adopt(self, book: WorkerBook, running: Running, now_s: float) -> None:
        """A worker runs what its book has not. It goes on unless something newer is known.

        Where no gateway has claimed the request, the higher of two attempts wins; where one has, its own.
        """
        attempt = running.attempt
        live = self.live(attempt)
        held = book.adopt(running)
        if request := self.requests.get(attempt.request_id):
            request.arrival = min(request.arrival, running.arrival)  # claimed before this was heard
        if live is None and self.last_ended(attempt) < attempt.number:
            if attempt.request_id not in self.requests:
                self.requests[attempt.request_id] = Request(running.arrival, None)
                self.unclaimed[attempt.request_id] = now_s
            self.requests[attempt.request_id].sequences[attempt.index] = held
        elif isinstance(live, Waiting) and live.attempt == attempt:
            self.queue.remove(attempt)
            self.requests[attempt.request_id].sequences[attempt.index] = held
            self._describe(held, live)
        elif isinstance(live, Held) and live.attempt < attempt and attempt.request_id in self.unclaimed:
            self.workers[live.worker].stop(live)
            self.requests[attempt.request_id].sequences[attempt.index] = held
        else:
            book.stop(held)

    def claim(self, submission: Submission, gateway: Incarnation, now_s: float) -> None:
        """What a worker was found running is this gateway's."""
        request = self.requests[submission.request_id]
        request.gateway = gateway
        self._bound(submission, request, now_s)
        del self.unclaimed[submission.request_id]

    def recognise(self, entry: Waiting) -> None:
        """Its gateway says of a live attempt what it is."""
        live = self.live(entry.attempt)
        if isinstance(live, Held) and not live.tokens_total:
            self._describe(live, entry)

    def _describe(self, held: Held, entry: Waiting) -> None:
        """It was started by an earlier term: from now on its tenant is charged with it here."""
        held.describe(entry)
        self.shares.charge(held.tenant, held.max_tokens - held.num_accepted)

    def _bound(self, submission: Submission, request: Request, now_s: float) -> None:
        """The first word on its deadline counts: later ones only took another while to be heard."""
        if submission.time_left_s and request.deadline_s == math.inf:
            request.deadline_s = now_s + submission.time_left_s
            heapq.heappush(self._deadlines, (request.deadline_s, submission.request_id))
            if len(self._deadlines) > 2 * len(self.requests) + DEADLINES_SLACK:
                left = [(r.deadline_s, name) for name, r in self.requests.items() if r.deadline_s < math.inf]
                self._deadlines = left
                heapq.heapify(left)

    def expire(self, now_s: float) -> Iterator[CloseAttempt]:
        """End the requests whose time is up, wherever they are."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.deadline_s <= now_s:
                for live in list(request.sequences.values()):
                    self.withdraw(live.attempt)
                    if request.gateway is not None:
                        yield CloseAttempt(request.gateway, live.attempt, CloseReason.DEADLINE, "its time is up")

    def withdraw(self, attempt: AttemptId) -> None:
        """A live attempt is not wanted any more, wherever it is."""
        live = self.requests[attempt.request_id].sequences[attempt.index]
        if isinstance(live, Held):
            self.workers[live.worker].stop(live)
        self.end(attempt)

    def end(self, attempt: AttemptId) -> Incarnation | None:
        """A live attempt that did not finish is live no more, wherever it was.

        Remembered, so that it never runs again under its number. Returns its gateway, if one claimed it.
        """
        if isinstance(self.requests[attempt.request_id].sequences[attempt.index], Waiting):
            self.queue.remove(attempt)
        request = self.requests.pop(attempt.request_id)
        self._forget(attempt.request_id, request, attempt.index)
        self.remember(attempt, request.arrival)
        return request.gateway

    def finish(self, sequences: Iterable[Held]) -> None:
        """These, each the live attempt at its worker, have finished. Not remembered: their gateways have all of
        them (a completion means that), and would be given them again if they asked."""
        pop = self.requests.pop  # not a look and a deletion: one walk through cold memory
        for held in sequences:
            request_id = held.attempt[0]
            request = pop(request_id)
            if len(request.sequences) > 1 or request.gateway is None:
                self._forget(request_id, request, held.attempt.index)

    def _forget(self, request_id: str, request: Request, index: int) -> None:
        """One sequence of a request that was taken out."""
        if len(request.sequences) > 1:
            del request.sequences[index]
            self.requests[request_id] = request
        elif request.gateway is None:
            del self.unclaimed[request_id]

    def move(self, held: Held, by: WorkerBook, to: WorkerBook, now_s: float) -> Iterator[CloseAttempt]:
        """Take a live attempt off one worker, and keep room for it at another until its gateway has opened the
        next: that goes ahead of all that wait."""
        attempt, key = held.attempt, held.attempt[:2]
        by.stop(held)
        to.keep_room(key, held.tokens_total, now_s)
        self._moving[key] = to
        yield from self.close(attempt, CloseReason.PREEMPTED, f"{by.worker} gives it up, {to.worker} has room")

    def expire_moves(self, before_s: float) -> None:
        """Room that was kept since before that goes to whoever wants it."""
        if not self._moving:
            return
        here = set(self.workers.values())
        for book in here:
            book.expire_room(before_s)
        self._moving = {key: to for key, to in self._moving.items() if to in here and to.keeps_room(key)}

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
                books = [book for book in self.workers.values() if live in book.named([live.attempt])]
                expected = [self.workers[live.worker]] if isinstance(live, Held) else []
                assert books == expected, f"{live.attempt}: at {books}, expected {expected}"
                assert (live.attempt in waiting) == isinstance(live, Waiting), f"{live.attempt}: waiting?"
        assert all(self.is_live(attempt) for attempt in waiting)
        for book in self.workers.values():
            book.check()
            for held in book.held.values():
                is_live = self.live(held.attempt) is held
                assert held.stopping != is_live, f"{held.attempt} at {book.worker} is nobody's, or two's"
        assert self.starting.num == sum(book.num_starting for book in self.workers.values())
        assert self.starting.rows == sum(book.rows_ahead for book in self.workers.values())
        assert self.unclaimed.keys() == {key for key, r in self.requests.items() if r.gateway is None}
        assert len(self._ended) <= self._ended_max

    def what_is_missing(self) -> str:
        """What keeps present workers from taking anything at all, to be added to a refusal."""
        without = [str(worker) for worker, book in sorted(self.workers.items()) if book.experts_missing]
        return f"; experts are missing at {', '.join(without)}" if without else ""

    @property
    def heard(self) -> set[Incarnation]:
        """Workers that have said what they run after they refused orders of older terms."""
        return {worker for worker, book in self.workers.items() if book.applied}

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

"""What attention workers say, and what becomes of it: states, endings, losses. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from cluster.scheduler.admission import Service
from cluster.scheduler.books import Books
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    AttemptId,
    CloseReason,
    Command,
    DropLink,
    FinishReason,
    Incarnation,
    MembersExpected,
    Running,
    SendPlan,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from cluster.scheduler.preempting import who_gives_way
from cluster.scheduler.recovery import Recovery
from cluster.scheduler.workers import Held, WorkerBook

# How an attempt closes that its worker ended without finishing the sequence.
CLOSED_BY_WORKER = {
    FinishReason.CANCELLED: CloseReason.PREEMPTED,  # not by us: its tokens were refused, or it drains
    FinishReason.FAILED: CloseReason.FAILED,
}


class WorkerSide:
    def __init__(
        self,
        config: SchedulerConfig,
        term: int,
        fingerprint: str,
        books: Books,
        recovery: Recovery,
        service: Service,
        counters: Counter[str],
    ) -> None:
        self._config = config
        self._term = term
        self._fingerprint = fingerprint
        self._books = books
        self._recovery = recovery
        self._service = service
        self._counters = counters
        self._looked_s = -math.inf  # for who might give way
        self._draining: frozenset[Incarnation] | None = None  # None: the controller has not said

    def joined(self, event: WorkerJoined, now_s: float) -> Iterator[Command]:
        worker = event.worker
        if event.fingerprint != self._fingerprint:
            self._counters["refused_fingerprint"] += 1
            reason = f"fingerprint {event.fingerprint!r}, this cluster serves {self._fingerprint!r}"
            yield DropLink(worker, reason)
            return
        if self._recovery.has_lost(worker):
            self._counters["refused_incarnation"] += 1
            yield DropLink(worker, "the controller has lost it")
            return
        others = [other for other in self._books.workers if other.id == worker.id and other != worker]
        if any(other > worker for other in others):
            self._counters["refused_incarnation"] += 1
            yield DropLink(worker, f"{max(others)} has joined since")
            return
        for other in others:
            yield from self._lose(other, f"worker {other} was replaced by {worker}")
        book = self._books.book_of(worker)
        yield from self._endings(book, event.report)
        gone = book.link(event.limits, event.report, self._term)
        book.is_draining = event.report.draining if self._draining is None else worker in self._draining
        self._books.add_worker(book)
        yield from self._settle(book, gone, event.report.state or (), now_s)

    def lost(self, event: WorkerLost, now_s: float) -> Iterator[Command]:
        book = self._linked(event.worker)
        if book:
            book.unlinked_s = now_s
            if not self._recovery.expects(event.worker):
                yield from self._lose(event.worker, f"worker {event.worker} left")

    def reported(self, event: WorkerReported, now_s: float) -> Iterator[Command]:
        book = self._linked(event.worker)
        if not book:
            return
        violation = book.violation(event, self._term)
        if violation:
            self._counters["refused_reports"] += 1
            book.unlinked_s = now_s
            yield DropLink(event.worker, violation)
            return
        rows_before = book.rows_done
        yield from self._endings(book, event)
        gone = book.update(event, self._term)
        if book.rows_done > rows_before:
            self._service.add_rows(book.rows_done - rows_before)
        yield from self._settle(book, gone, event.state or (), now_s)
        # They have lost their blocks already, so nothing more is lost. A bounded number of times each: a gateway
        # opens no more than so many attempts.
        paused = [held for held in book.named(event.paused) if held.attempt.number <= self._config.yields_max]
        if paused:
            yield from self._move_off(book, paused, now_s)

    def members_expected(self, event: MembersExpected, _now_s: float) -> Iterator[Command]:
        """The controller's word is final: whoever is not expected is lost now, also where its stream has not
        noticed (it hangs, or its node is gone or cut off)."""
        self._recovery.expect(event.workers)
        self._draining = event.draining
        for book in self._books.workers.values():
            book.is_draining = book.worker in event.draining
        for worker in sorted(self._books.workers.keys() - event.workers):
            if self._books.workers[worker].unlinked_s is None:
                yield DropLink(worker, "the controller has lost it")
            yield from self._lose(worker, f"worker {worker} was lost")

    def judge(self, now_s: float) -> Iterator[Command]:
        """Give back the sequences of workers whose links have been gone for too long."""
        deadline_s = self._config.worker_deadline_s
        for book in self._unlinked():
            if book.unlinked_s is not None and now_s - book.unlinked_s >= deadline_s:
                yield from self._lose(book.worker, f"worker {book.worker} was lost")

    def drain(self, now_s: float) -> Iterator[Command]:
        """Move what draining workers still run to where there is room: the latest first, which lose least."""
        self._books.expire_moves(now_s - self._config.gateway_lease_s)
        if self._config.drain == "move" and self._recovery.over:
            for _, book in sorted(self._books.workers.items()):
                if book.is_draining and book.unlinked_s is None:
                    yield from self._move_off(book, list(reversed(book.held.values())), now_s)

    def preempt(self, now_s: float) -> Iterator[Command]:
        """Have others give way to the next in turn, if it has waited long enough. Looked at as often as that."""
        entry = next(iter(self._books.queue), None)
        if entry is None or entry.goes_on or now_s - entry.queued_s < self._config.preempt_after_s:
            return
        books = [book for _, book in sorted(self._books.workers.items())]
        if now_s - self._looked_s < self._config.preempt_after_s or any(book.has_starts for book in books):
            return  # what goes with this round's plans cannot be stopped by them
        self._looked_s = now_s
        if entry.is_called and any(held.gives_way for book in books for held in book.held.values()):
            return  # under way
        asked = who_gives_way(entry, books, self._config)
        if asked is None:
            return
        if not entry.is_called:
            self._books.queue.call(entry)
        for held in asked.victims:
            held.gives_way = True
            asked.book.stop(held)
            self._counters["preempted"] += 1
            detail = f"gives way to priority {entry.submission.priority}"
            yield from self._close(held.attempt, CloseReason.PREEMPTED, detail)

    def restart_deadlines(self, now_s: float) -> None:
        for book in self._unlinked():
            book.unlinked_s = now_s

    def plans(self) -> Iterator[Command]:
        for worker, book in sorted(self._books.workers.items()):
            plan = book.next_plan(self._config)
            if plan:
                self._counters["plans"] += 1
                yield SendPlan(worker, plan)

    def _linked(self, worker: Incarnation) -> WorkerBook | None:
        book = self._books.workers.get(worker)
        if book and book.unlinked_s is None:
            return book
        self._counters["ignored_unknown_worker"] += 1
        return None

    def _unlinked(self) -> list[WorkerBook]:
        books = self._books.workers
        return [books[worker] for worker in sorted(books) if books[worker].unlinked_s is not None]

    def _lose(self, worker: Incarnation, detail: str) -> Iterator[Command]:
        self._counters["workers_lost"] += 1
        book = self._books.lose_worker(worker)
        for held in sorted(book.held.values(), key=lambda held: held.attempt):
            self._give_back(held)
            if not held.stopping:
                yield from self._close(held.attempt, CloseReason.WORKER_LOST, detail)

    def _endings(self, book: WorkerBook, report: WorkerReported) -> Iterator[Command]:
        """Ten thousand in a round: what most of them need is looked up before the loop."""
        finished: list[Held] = []
        num_stopped = num_ignored = 0
        length, failed = int(FinishReason.LENGTH), int(FinishReason.FAILED)  # reasons beyond length: not finished
        unused: dict[str, int] = {}  # tokens that were charged, by tenant
        handles, reasons, counts, details = report.endings
        why = iter(details)
        for held, reason, num_tokens in zip(book.release(handles), reasons, counts, strict=True):
            detail = next(why) if reason == failed else ""
            if held is None:
                num_ignored += 1
                continue
            if num_tokens < held.max_tokens:
                unused[held.tenant] = unused.get(held.tenant, 0) + held.max_tokens - num_tokens
            if held.stopping:
                num_stopped += 1
            elif reason > length:
                yield from self._close(held.attempt, CLOSED_BY_WORKER[FinishReason(reason)], detail)
            else:
                finished.append(held)
        self._books.finish(finished)
        for tenant, num_unused in unused.items():
            self._books.shares.give_back(tenant, num_unused)
        if handles:
            self._service.add_ended(len(handles) - num_ignored)
            found = {"ended_finished": len(finished), "stopped": num_stopped, "ignored_completions": num_ignored}
            self._counters.update({name: count for name, count in found.items() if count})
        for held in book.named(report.undelivered):
            book.release([held.handle])
            self._give_back(held)
            if not held.stopping:
                detail = "its worker could not reach its gateway"
                yield from self._close(held.attempt, CloseReason.WORKER_LOST, detail)

    def _settle(
        self, book: WorkerBook, gone: Iterable[Held], state: Iterable[Running], now_s: float
    ) -> Iterator[Command]:
        """Bring the books to what the worker says it runs."""
        for held in gone:
            self._give_back(held)
            if self._books.live(held.attempt) is held:
                yield from self._close(held.attempt, CloseReason.WORKER_LOST, f"{book.worker} does not run it")
        for running in state:
            if running.handle not in book.held:
                self._counters["adopted"] += 1
                self._books.adopt(book, running, now_s)

    def _move_off(self, book: WorkerBook, sequences: Iterable[Held], now_s: float) -> Iterator[Command]:
        """To workers that have room for all that each can become. Where there is none it stays; nobody is added to
        those who wait to go on already."""
        if self._books.queue.num_resumes:
            return
        others = [other for _, other in sorted(self._books.workers.items()) if other is not book]
        for held in sequences:
            able = [other for other in others if other.accepts()]
            if not able:
                return
            if held.stopping or not held.tokens_total:
                continue
            to = next((other for other in able if other.has_room_for(held.tokens_total)), None)
            if to is not None:
                self._counters["moved"] += 1
                self._counters[f"ended_{CloseReason.PREEMPTED.name.lower()}"] += 1
                yield from self._books.move(held, book, to, now_s)

    def _give_back(self, held: Held) -> None:
        """What was charged for an answer of which its worker will say no more."""
        self._books.shares.give_back(held.tenant, held.max_tokens - held.num_accepted)

    def _close(self, attempt: AttemptId, reason: CloseReason, detail: str) -> Iterator[Command]:
        self._counters[f"ended_{reason.name.lower()}"] += 1
        yield from self._books.close(attempt, reason, detail)

"""What attention workers say, and what becomes of it: states, endings, losses. Pure."""

from __future__ import annotations

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
from cluster.scheduler.recovery import Recovery
from cluster.scheduler.workers import WorkerBook

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

    def joined(self, event: WorkerJoined, now_s: float) -> Iterator[Command]:
        worker = event.worker
        if event.fingerprint != self._fingerprint:
            self._counters["refused_fingerprint"] += 1
            reason = f"fingerprint {event.fingerprint!r}, this cluster serves {self._fingerprint!r}"
            yield DropLink(worker, reason)
            return
        others = [other for other in self._books.workers if other.id == worker.id and other != worker]
        if any(other > worker for other in others):
            self._counters["refused_incarnation"] += 1
            yield DropLink(worker, f"{max(others)} has joined since")
            return
        for other in others:
            yield from self._lose(other, f"worker {other} was replaced by {worker}")
        book = self._books.workers.get(worker) or WorkerBook(
            worker, self._config.chunk_tokens_max, self._config.prefix_hints_max
        )
        yield from self._endings(book, event.report)
        gone = book.link(event.limits, event.report, self._term)
        self._books.workers[worker] = book
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
            self._service.rows.add(book.rows_done - rows_before)
        yield from self._settle(book, gone, event.state or (), now_s)
        yield from self._move(book, event.paused)

    def members_expected(self, event: MembersExpected, _now_s: float) -> Iterator[Command]:
        """The controller's word is final: whoever is gone and not expected is lost now."""
        self._recovery.expect(event.workers)
        for book in self._unlinked():
            if book.worker not in event.workers:
                yield from self._lose(book.worker, f"worker {book.worker} was lost")

    def judge(self, now_s: float) -> Iterator[Command]:
        """Give back the sequences of workers whose links have been gone for too long."""
        deadline_s = self._config.worker_deadline_s
        for book in self._unlinked():
            if book.unlinked_s is not None and now_s - book.unlinked_s >= deadline_s:
                yield from self._lose(book.worker, f"worker {book.worker} was lost")

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
        book = self._books.workers.pop(worker)
        for attempt, held in sorted(book.held.items()):
            self._books.shares.give_back(held.tenant, held.max_tokens - held.num_accepted)
            if not held.stopping:
                yield from self._close(attempt, CloseReason.WORKER_LOST, detail)

    def _endings(self, book: WorkerBook, report: WorkerReported) -> Iterator[Command]:
        num_finished = num_stopped = num_ignored = 0
        release, finish = book.release, self._books.finish
        unused: dict[str, int] = {}  # tokens that were charged, by tenant
        for attempt, reason, detail, num_tokens in report.completions:
            held = release(attempt)
            if held is None:
                num_ignored += 1
                continue
            if num_tokens < held.max_tokens:
                unused[held.tenant] = unused.get(held.tenant, 0) + held.max_tokens - num_tokens
            if held.stopping:
                num_stopped += 1
            elif reason is FinishReason.CANCELLED or reason is FinishReason.FAILED:
                yield from self._close(attempt, CLOSED_BY_WORKER[reason], detail)
            else:
                num_finished += 1
                finish(attempt)
        for tenant, num_unused in unused.items():
            self._books.shares.give_back(tenant, num_unused)
        if report.completions:
            self._service.ended.add(len(report.completions))
            counts = {"ended_finished": num_finished, "stopped": num_stopped, "ignored_completions": num_ignored}
            self._counters.update({name: count for name, count in counts.items() if count})
        for attempt in report.undelivered:
            held = book.release(attempt)
            if held is not None and not held.stopping:
                detail = "its worker could not reach its gateway"
                yield from self._close(attempt, CloseReason.WORKER_LOST, detail)

    def _settle(
        self, book: WorkerBook, gone: Iterable[AttemptId], state: Iterable[Running], now_s: float
    ) -> Iterator[Command]:
        """Bring the books to what the worker says it runs."""
        for attempt in gone:
            if self._books.runs_at(attempt, book.worker):
                yield from self._close(attempt, CloseReason.WORKER_LOST, f"{book.worker} does not run it")
        for running in state:
            if running.attempt not in book.held:
                self._counters["adopted"] += 1
                self._books.adopt(book, running, now_s)

    def _move(self, book: WorkerBook, paused: Iterable[AttemptId]) -> Iterator[Command]:
        """What a dry worker paused goes to another that has room for all it can become; it has lost its blocks
        already, so nothing more is lost. Where there is none it stays, and is recomputed when there is room."""
        others = [other for _, other in sorted(self._books.workers.items()) if other is not book]
        for attempt in paused:
            held = book.held.get(attempt)
            if held is None or held.stopping or not held.tokens_total:
                continue
            total = held.tokens_total
            to = next((other for other in others if other.accepts() and other.has_room_for(total)), None)
            if to is not None:
                others.remove(to)  # one each: its room is promised to none until it is placed
                book.stop(attempt)
                self._counters["moved"] += 1
                detail = f"{book.worker} is out of blocks, {to.worker} has room"
                yield from self._close(attempt, CloseReason.PREEMPTED, detail)

    def _close(self, attempt: AttemptId, reason: CloseReason, detail: str) -> Iterator[Command]:
        self._counters[f"ended_{reason.name.lower()}"] += 1
        yield from self._books.close(attempt, reason, detail)

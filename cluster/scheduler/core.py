"""The central batch scheduler: who runs where, with what memory.

Events go in one at a time through `step`, which answers at once; plans come out of `round`, once the
inbox is drained, so that a burst of submissions makes one plan per worker and a round in which nothing
changed makes none. Pure: the same events at the same times give the same commands.

Holds counts, never tensors, and not what has been generated: that is the gateways' truth. So it can be
lost. After every (re)connection a worker says what it runs, and a gateway submits again, with `resume`
set, what it still wants. Until the expected workers have spoken, or a deadline passed, nothing is
placed. An attempt that may have run elsewhere is never placed again under its number: it is closed, and
the gateway opens the next.

It does not own the life cycle of workers (the controller), the blocks (each worker) or epochs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from cluster.scheduler.admission import Service
from cluster.scheduler.books import Books
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    CancelRequested,
    CloseReason,
    Command,
    Event,
    FinishRequested,
    GatewayJoined,
    GatewayLost,
    MembersExpected,
    Submitted,
    Tick,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from cluster.scheduler.gateway_side import GatewaySide
from cluster.scheduler.recovery import Recovery
from cluster.scheduler.worker_side import WorkerSide


class Scheduler:
    """`now_s` is any clock that does not go back."""

    def __init__(self, config: SchedulerConfig, term: int, fingerprint: str) -> None:
        self.config = config
        self.term = term
        self.fingerprint = fingerprint
        self.counters: Counter[str] = Counter()  # what was refused, ignored or ended, and why
        self._books = Books(config, term)
        self._recovery = Recovery(config.recovery_deadline_s)
        self._service = Service(config.rate_window_s)
        shared = (self._books, self._recovery, self._service, self.counters)
        self._gateways = GatewaySide(config, fingerprint, *shared)
        self._workers = WorkerSide(config, term, fingerprint, *shared)
        self._now_s: float | None = None
        self._tokens_max_told = 0
        self._handlers: dict[type, Callable[[Any, float], Iterator[Command]]] = {
            GatewayJoined: self._gateways.joined,
            GatewayLost: self._gateways.lost,
            Submitted: self._gateways.submitted,
            CancelRequested: self._gateways.cancel,
            FinishRequested: self._gateways.finish,
            WorkerJoined: self._workers.joined,
            WorkerLost: self._workers.lost,
            WorkerReported: self._workers.reported,
            MembersExpected: self._workers.members_expected,
            Tick: self._judge,
        }

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Take one event. Raises before anything changes when it is none, or when time goes back."""
        handler = self._handlers.get(type(event))
        if handler is None:
            raise TypeError(f"not an event: {event!r}")
        self._advance(now_s)
        return list(handler(event, now_s))

    def round(self, now_s: float) -> list[Command]:
        """Place what can be placed: at most one plan per worker, none where nothing changed."""
        self._advance(now_s)
        commands: list[Command] = []
        before, self._tokens_max_told = self._tokens_max_told, self._books.tokens_max
        if self._tokens_max_told != before:
            commands.extend(self._gateways.welcome_all())
            if before == 0:
                commands.extend(self._gateways.judge_sizes())
        if self._recovery.over:
            self._books.place(self._gateways.address_of, self.config.plan_bytes_max)
            commands.extend(self._workers.preempt(now_s))
        self._service.is_full = len(self._books.queue) > 0
        commands.extend(self._workers.plans())
        return commands

    def snapshot(self) -> dict[str, float]:
        """Gauges for status and metrics; a worker's are under `worker/<id>/`.

        May be asked from another thread: it iterates over copies only.
        """
        books, queue = self._books, self._books.queue
        workers = sorted(books.workers.items())
        gauges: dict[str, float] = {
            "term": self.term,
            "recovering": not self._recovery.over,
            "gateways": self._gateways.num_linked(),
            "workers": sum(book.unlinked_s is None for _, book in workers),
            "requests": len(books.requests),
            "waiting": len(queue),
            "waiting_tokens": queue.num_tokens,
            "running": sum(len(book.held) for _, book in workers),
            "completions_per_s": self._service.ended.per_second(),
        }
        for worker, book in workers:
            gauges |= {f"worker/{worker.id}/{name}": value for name, value in book.gauges().items()}
        gauges |= {f"{name}_total": count for name, count in sorted(self.counters.items())}
        return gauges

    def check(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        self._books.check()

    def _advance(self, now_s: float) -> None:
        """A long silence of our own clock means that we were frozen, not that everybody else was: all
        deadlines start again, so that what waits in the inbox is heard before anyone is judged."""
        before_s = now_s if self._now_s is None else self._now_s
        if now_s < before_s:
            raise ValueError(f"now_s {now_s} is before {before_s}")
        if now_s - before_s > self.config.tick_gap_s_max:
            self.counters["clock_gaps"] += 1
            self._recovery.restart(now_s)
            self._gateways.restart_leases(now_s)
            self._workers.restart_deadlines(now_s)
            self._books.queue.restart_waits(now_s)
        elif len(self._books.queue) or self._books.starting.num:
            self._service.wait(now_s - before_s)
        self._now_s = now_s

    def _judge(self, _event: Tick, now_s: float) -> Iterator[Command]:
        if self._recovery.judge(self._books.heard, now_s):
            yield from self._gateways.judge_claims()
        yield from self._workers.judge(now_s)
        yield from self._workers.drain(now_s)
        self._gateways.judge(now_s)
        for closed in self._books.expire(now_s):
            self.counters["ended_deadline"] += 1
            yield closed
        for entry in self._books.queue.overdue(now_s, self.config.queue_wait_s_max):
            self.counters["ended_overdue"] += 1
            detail = (
                f"no worker could take its {entry.num_tokens} tokens within {self.config.queue_wait_s_max:g} s"
            )
            detail += self._books.what_is_missing()
            yield from self._books.close(entry.attempt, CloseReason.FAILED, detail)

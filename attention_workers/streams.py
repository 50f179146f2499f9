"""The worker's streams on one asyncio loop in a thread of its own, so that waiting never holds up a step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from expertmesh.v1 import step_pb2

from attention_workers import wire
from attention_workers.book import Book
from attention_workers.deliveries import parted
from attention_workers.links import SchedulerLink, TokenLinks
from attention_workers.step import AttemptId, Completion, Plan, StepResult
from router.placement import Member

_REPORTS_MAX = 4096
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True)
class Snapshot:
    """One moment of the worker: what runs is what its counts say has been applied."""

    counts: step_pb2.WorkerReport
    running: step_pb2.State  # made anew when something begins, ends or has its prompt done: not at every token


@dataclass(frozen=True)
class GatewayGone:
    """A gateway cannot be reached; `undelivered` ended here, but their last tokens may not have arrived."""

    address: str
    undelivered: list[AttemptId]


@dataclass(frozen=True)
class AttemptsRefused:
    """A gateway does not want these (any more)."""

    attempts: list[AttemptId]


@dataclass(frozen=True)
class Greeted:
    """A new stream to the scheduler has begun, with all that ran. Plans of the one before that still wait were not
    in it: the scheduler takes them for lost, and gives again what they said under their numbers."""


Item: TypeAlias = Plan | GatewayGone | AttemptsRefused | Greeted
"""What streams tell the compute thread."""

T = TypeVar("T")


def still_said(items: list[T]) -> list[T]:
    """Of what was told, in order: all but the plans of streams that had ended before they were looked at."""
    greeted = max((i for i, item in enumerate(items) if isinstance(item, Greeted)), default=0)
    return [item for i, item in enumerate(items) if i >= greeted or not isinstance(item, Plan)]


class Streams:
    """`open` once the worker can run sequences; `hand_over` from the compute thread; `close` at the end."""

    def __init__(
        self,
        member: Member,
        token: str,
        scheduler_address: str,
        backlog_max: int,
        tell: Callable[[Item], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """`tell` must not wait. `on_failure`: a stream's task ended that should not have, and why."""
        self.member = member
        self._token, self._scheduler_address, self._backlog_max = token, scheduler_address, backlog_max
        self._tell = tell
        self._on_failure = on_failure
        self.latest = Snapshot(step_pb2.WorkerReport(), step_pb2.State())
        """Replaced whole, by the compute thread alone: the loop never sees counts of one moment with what ran at
        another."""
        self.turns = 0  # grows while the loop turns
        self._num_given = 0  # results handed over; written by the compute thread alone
        self._num_taken = 0  # of those; this and the next are written by the loop alone
        self._num_unarrived = 0  # sequences that have ended, and whose last tokens nobody has taken yet
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="attention-streams", daemon=True)
        self._tasks: list[asyncio.Task[None]] = []
        self._tokens: TokenLinks | None = None

    def open(self, book: Book) -> None:
        """Start the streams; further calls change nothing."""
        if self._thread.is_alive():
            return
        self._hello = wire.hello_pb(book)
        counts = wire.report_pb(self.member, book, 0, 0, experts_missing=False)
        self.latest = Snapshot(counts, wire.state_pb(book.state()))
        self._scheduler = SchedulerLink(
            self._scheduler_address, self._token, self._tell, self._greet, _REPORTS_MAX
        )
        self._thread.start()
        self._loop.call_soon_threadsafe(self._begin, book.fingerprint)

    def hand_over(self, result: StepResult, latest: Snapshot) -> None:
        """What a step brought about, with the counts after it."""
        self._num_given += 1  # before the counts are seen: what has ended is in one of them
        self.latest = latest
        self._loop.call_soon_threadsafe(self._send_or_fail, result, latest.counts)

    @property
    def num_open(self) -> int:
        """At least those that run, or have ended and whose last tokens may not have arrived. From any thread."""
        num_running, num_given = self.latest.counts.num_running, self._num_given
        return num_running + num_given - self._num_taken + self._num_unarrived

    def close(self, grace_s: float) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(grace_s)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(grace_s)
        self._loop.close()

    # --- on the loop -------------------------------------------------------------------------

    def _begin(self, fingerprint: str) -> None:
        self._tokens = TokenLinks(
            self.member,
            fingerprint,
            self._token,
            self._backlog_max,
            on_completed=self._completed,
            on_refused=lambda attempts: self._tell(AttemptsRefused(attempts)),
            on_broken=self._broken,
        )
        self._tasks = [self._loop.create_task(work) for work in (self._scheduler.run(), self._report_counts())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._on_failure(f"a stream's task ended: {task.exception()!r}")

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tokens is not None:
            await self._tokens.close()
        await self._loop.shutdown_asyncgens()

    def _greet(self) -> step_pb2.WorkerReport:
        """The first report of a stream: capacity, and everything that runs."""
        self._tell(Greeted())
        latest = self.latest
        report = step_pb2.WorkerReport()
        report.CopyFrom(latest.counts)
        report.hello.CopyFrom(self._hello)
        report.state.CopyFrom(latest.running)
        return report

    def _send_or_fail(self, result: StepResult, counts: step_pb2.WorkerReport) -> None:
        try:
            self._send(result, counts)
        except Exception as error:
            # The loop would only log it; but tokens of a step are gone, so the worker must not go on.
            self._on_failure(f"a step's tokens could not be sent: {error!r}")
            raise
        self._num_taken += 1

    def _send(self, result: StepResult, counts: step_pb2.WorkerReport) -> None:
        assert self._tokens is not None
        batches, now = parted(result)
        for address, batch in batches.items():
            self._num_unarrived += len(batch.completions)
            self._tokens.send(address, batch)
        if now or replace(result, completions=[]).is_news():
            self._scheduler.report(wire.news_pb(counts, result, now))

    def _completed(self, completions: list[Completion]) -> None:
        """Their last tokens have arrived: now the scheduler may forget them."""
        self._num_unarrived -= len(completions)
        self._scheduler.report(wire.news_pb(self.latest.counts, StepResult(), completions))

    def _broken(self, address: str, undelivered: list[AttemptId]) -> None:
        self._num_unarrived -= len(undelivered)
        self._tell(GatewayGone(address, undelivered))

    async def _report_counts(self) -> None:
        """Counts drift without news while sequences decode; the scheduler places by them."""
        sent = step_pb2.WorkerReport()
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            self.turns += 1
            counts = self.latest.counts
            if counts != sent:
                sent = counts
                self._scheduler.report(sent)

"""What gateways say, and what becomes of it: submissions, cancellations, leases. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.scheduler import admission
from cluster.scheduler.books import Books
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    Accept,
    AttemptId,
    CancelRequested,
    CloseAttempt,
    CloseReason,
    Command,
    DropLink,
    FinishRequested,
    GatewayJoined,
    GatewayLost,
    Incarnation,
    Reject,
    RejectCode,
    Sibling,
    Submission,
    Submitted,
    Welcome,
)
from cluster.scheduler.recovery import Recovery
from cluster.scheduler.waiting import Waiting

NEWEST = 1 << 64  # an arrival after all that there are


@dataclass(slots=True)
class Gateway:
    gateway: Incarnation
    token_address: str
    unlinked_s: float | None = None  # since when its link is gone


class GatewaySide:
    def __init__(
        self,
        config: SchedulerConfig,
        fingerprint: str,
        books: Books,
        recovery: Recovery,
        service: admission.Service,
        counters: Counter[str],
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._books = books
        self._recovery = recovery
        self._service = service
        self._appointments = admission.Appointments()
        self._counters = counters
        self._gateways: dict[str, Gateway] = {}  # by id: one incarnation each

    def address_of(self, gateway: Incarnation) -> str:
        return self._gateways[gateway.id].token_address

    def joined(self, event: GatewayJoined, _now_s: float) -> Iterator[Command]:
        known = self._gateways.get(event.gateway.id)
        if known and known.gateway > event.gateway:
            self._counters["refused_incarnation"] += 1
            yield DropLink(event.gateway, f"{known.gateway} has joined since")
            return
        if known and known.gateway < event.gateway:
            self._cancel_all(known.gateway)
        self._gateways[event.gateway.id] = Gateway(event.gateway, event.token_address)
        yield Welcome(event.gateway, self._books.tokens_max)

    def lost(self, event: GatewayLost, now_s: float) -> Iterator[Command]:
        known = self._known(event.gateway)
        if known and known.unlinked_s is None:
            known.unlinked_s = now_s
        yield from ()

    def submitted(self, event: Submitted, now_s: float) -> Iterator[Command]:
        gateway, submission = event.gateway, event.submission
        if not self._known(gateway):
            return
        request = self._books.requests.get(submission.request_id)
        if request and request.gateway not in (None, gateway):
            self._counters["refused_not_owner"] += 1
            for sibling in submission.siblings:
                detail = f"request id {submission.request_id!r} is in use by {request.gateway}"
                yield CloseAttempt(gateway, _attempt(submission, sibling), CloseReason.FAILED, detail)
            return
        refusal = self._refusal(gateway, submission, now_s)
        if refusal:
            self._counters[f"refused_{refusal.code.name.lower()}"] += 1
            yield Reject(gateway, submission.request_id, refusal.code, refusal.message, refusal.retry_after_s)
            return
        if submission.request_id in self._books.unclaimed:
            self._books.claim(submission, gateway, now_s)
        arrival = self._books.arrival_of(submission)
        entries = [self._books.waiting(gateway, submission, s, arrival, now_s) for s in submission.siblings]
        yield Accept(gateway, submission.request_id, self._books.queue.ahead_of(entries[0]))
        for entry in entries:
            yield from self._take(entry)

    def cancel(self, event: CancelRequested, _now_s: float) -> Iterator[Command]:
        request = self._books.requests.get(event.request_id)
        if request and request.gateway == event.gateway:
            self._withdraw([live.attempt for live in request.sequences.values()], "cancelled")
        else:
            self._counters["ignored_cancels"] += 1
        yield from ()

    def finish(self, event: FinishRequested, _now_s: float) -> Iterator[Command]:
        request = self._books.requests.get(event.attempt.request_id)
        if request and request.gateway == event.gateway and self._books.is_live(event.attempt):
            self._withdraw([event.attempt], "finished_by_gateway")
        else:
            self._counters["ignored_finishes"] += 1
        yield from ()

    def judge(self, now_s: float) -> None:
        """End the leases that have run out."""
        lease_s = self._config.gateway_lease_s
        for known in sorted(self._gateways.values(), key=lambda known: known.gateway):
            if known.unlinked_s is not None and now_s - known.unlinked_s >= lease_s:
                self._cancel_all(known.gateway)
                del self._gateways[known.gateway.id]
        for request_id, since_s in sorted(self._books.unclaimed.items()):
            if now_s - since_s >= lease_s:
                live = self._books.requests[request_id].sequences.values()
                self._withdraw([sequence.attempt for sequence in live], "never_claimed")

    def judge_claims(self) -> Iterator[Command]:
        """Recovery is over: what may run at a worker that did not come back is not placed again under
        its number."""
        for entry in [entry for entry in self._books.queue if entry.submission.resume]:
            if self._must_reopen(entry.attempt, resume=True):
                yield from self._books.close(
                    entry.attempt, CloseReason.WORKER_LOST, "no worker that came back runs it"
                )

    def judge_sizes(self) -> Iterator[Command]:
        """The first workers have joined: what entered before, unjudged, and can never fit is given up."""
        tokens_max = self._books.tokens_max
        for entry in list(self._books.queue):
            if entry.tokens_total > tokens_max and not entry.submission.resume:
                self._counters["ended_too_large"] += 1
                detail = admission.too_large(entry.submission, tokens_max)
                yield from self._books.close(entry.attempt, CloseReason.FAILED, detail)

    def restart_leases(self, now_s: float) -> None:
        for known in self._gateways.values():
            if known.unlinked_s is not None:
                known.unlinked_s = now_s
        for request_id in self._books.unclaimed:
            self._books.unclaimed[request_id] = now_s

    def welcome_all(self) -> Iterator[Command]:
        for gateway_id in sorted(self._gateways):
            yield Welcome(self._gateways[gateway_id].gateway, self._books.tokens_max)

    def num_linked(self) -> int:
        return sum(known.unlinked_s is None for known in list(self._gateways.values()))

    def _known(self, gateway: Incarnation) -> Gateway | None:
        known = self._gateways.get(gateway.id)
        if known and known.gateway == gateway:
            return known
        self._counters["ignored_unknown_gateway"] += 1
        return None

    def _refusal(self, gateway: Incarnation, submission: Submission, now_s: float) -> admission.Refusal | None:
        if submission.fingerprint != self._fingerprint:
            return admission.Refusal(
                RejectCode.WRONG_MODEL,
                f"fingerprint {submission.fingerprint!r}, this cluster serves {self._fingerprint!r}",
            )
        if submission.resume or submission.request_id in self._books.requests:
            return None
        if not self._books.workers and self._recovery.over:
            return admission.Refusal(
                RejectCode.NOT_READY, "no attention worker is ready", self._config.retry_after_s_min
            )
        entry = self._books.waiting(gateway, submission, submission.siblings[0], NEWEST, now_s)
        books = self._books
        found = admission.refusal(
            entry, books.queue, books.tokens_max, books.starting, self._service, self._config
        )
        if found is None or found.code is not RejectCode.OVERLOADED:
            return found
        again_s = self._appointments.after(
            found.retry_after_s, self._service.ended.per_second(), now_s, self._config
        )
        return replace(found, retry_after_s=again_s)

    def _take(self, entry: Waiting) -> Iterator[Command]:
        """One sibling of what is accepted. The higher attempt wins."""
        attempt = entry.attempt
        live = self._books.live(attempt)
        if live and live.attempt == attempt:
            self._books.recognise(entry)  # said twice, or found running at a worker
            return
        detail = ""
        if live and live.attempt > attempt:
            detail = f"attempt {live.attempt.number} is already open"
        elif not live and self._must_reopen(attempt, entry.submission.resume):
            detail = "this attempt has ended, or may run at a worker that is not back"
        if detail:
            if not live:
                self._books.remember(attempt, entry.arrival)
            yield CloseAttempt(entry.gateway, attempt, CloseReason.WORKER_LOST, detail)
            return
        if live:
            self._books.withdraw(live.attempt)
        self._books.enqueue(entry)

    def _must_reopen(self, attempt: AttemptId, resume: bool) -> bool:
        """Whether a sequence under this number may have run, or still run, where we do not see it."""
        last_ended = self._books.last_ended(attempt)
        if last_ended:
            return last_ended >= attempt.number
        return resume and self._recovery.over and self._recovery.is_blind(self._books.heard)

    def _cancel_all(self, gateway: Incarnation) -> None:
        self._withdraw(self._books.of_gateway(gateway), "gateway_lost")

    def _withdraw(self, attempts: list[AttemptId], counter: str) -> None:
        for attempt in attempts:
            self._books.withdraw(attempt)
        self._counters[f"ended_{counter}"] += len(attempts)


def _attempt(submission: Submission, sibling: Sibling) -> AttemptId:
    return AttemptId(submission.request_id, sibling.index, sibling.attempt)

"""Gateways and workers without processes, as the scheduler sees them.

Workers apply plans, compute in chunks and run out of blocks; gateways keep each sequence's truth and open
the next attempt when one is closed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.scheduler.events import (
    Accept,
    AttemptId,
    Blocks,
    CloseAttempt,
    CloseReason,
    Command,
    Endings,
    Event,
    FinishReason,
    Incarnation,
    Plan,
    Reject,
    Running,
    Sibling,
    Start,
    Submission,
    Submitted,
    Welcome,
    WorkerJoined,
    WorkerLimits,
    WorkerReported,
)

MODEL = "model-a"
NOTHING = Blocks(0, 0)
CHUNK_TOKENS = 64  # at most, of a worker's step here


class Completion(NamedTuple):
    """One sequence that a worker has ended."""

    handle: int
    reason: FinishReason
    detail: str = ""
    num_tokens: int = 0


def endings(completions: Iterable[Completion]) -> Endings:
    handles, reasons, details, num_tokens = tuple(zip(*completions, strict=True)) or ((),) * 4
    failed = [why for reason, why in zip(reasons, details, strict=True) if reason is FinishReason.FAILED]
    return Endings(handles, reasons, num_tokens, failed)


def token_at(request_id: str, index: int, position: int) -> int:
    """What every worker samples here: a function of the sequence and the position only."""
    return zlib.crc32(f"{request_id}/{index}/{position}".encode()) % 1000


def submission(
    request_id: str,
    num_prompt: int = 10,
    max_tokens: int = 10,
    siblings: tuple[Sibling, ...] | None = None,
    priority: int = 0,
    resume: bool = False,
    fingerprint: str = MODEL,
    tenant: str = "",
    time_left_s: float = 0.0,
    waited_s: float = 0.0,
) -> Submission:
    siblings = siblings or (Sibling(0, 1, 7, ()),)
    tokens = num_prompt + sum(len(sibling.accepted) for sibling in siblings)
    return Submission(
        request_id=request_id,
        fingerprint=fingerprint,
        prompt=tuple(range(num_prompt)),
        max_tokens=max_tokens,
        spec=max_tokens,  # opaque to the scheduler, read by SimWorker
        siblings=siblings,
        priority=priority,
        resume=resume,
        num_bytes=4 * tokens + 100,
        tenant=tenant,
        time_left_s=time_left_s,
        waited_s=waited_s,
    )


@dataclass
class SimSequence:
    start: Start
    tokens: list[int]  # generated
    computed: int = 0
    blocks: Blocks = NOTHING
    is_paused: bool = False
    prompt_told: bool = False

    @property
    def order(self) -> tuple[int, int, AttemptId]:
        return (self.start.priority, self.start.arrival, self.start.attempt)

    @property
    def num_tokens(self) -> int:
        return len(self.start.prompt) + len(self.tokens)


class SimWorker:
    """Applies plans, computes in chunks, pauses when its pool is dry."""

    def __init__(self, incarnation: Incarnation, limits: WorkerLimits) -> None:
        self.incarnation = incarnation
        self.limits = limits
        self.sequences: dict[AttemptId, SimSequence] = {}
        self.free = Blocks(limits.blocks_total, limits.sliding_blocks_total)
        self.term = self.plan_number = self.refused = self.tokens = 0
        self.news: dict[str, list] = {}

    def hello(self) -> WorkerJoined:
        report = self.report(self.state())
        return WorkerJoined(self.incarnation, MODEL, self.limits, report)

    def state(self) -> tuple[Running, ...]:
        return tuple(
            Running(attempt, s.num_tokens, s.prompt_told, s.start.arrival, s.start.handle)
            for attempt, s in self.sequences.items()
        )

    def report(self, state: tuple[Running, ...] | None = None) -> WorkerReported:
        """What is new, with the counts."""
        news, self.news = self.news, {}
        ended = endings(news.pop("completions", []))  # type: ignore[arg-type]
        return WorkerReported(
            worker=self.incarnation,
            term=self.term,
            plan_number=self.plan_number,
            refused_orders=self.refused,
            blocks_free=self.free.full,
            sliding_blocks_free=self.free.sliding,
            num_paused=sum(s.is_paused for s in self.sequences.values()),
            tokens=self.tokens,
            state=state,
            endings=ended,
            **{name: tuple(said) for name, said in news.items()},
        )

    def apply(self, term: int, plan: Plan) -> WorkerReported | None:
        """An answer, where the plan asks for one or does not follow."""
        if term < self.term:
            self.refused += 1
            return None
        if plan.number != (self.plan_number + 1 if term == self.term else 1):
            self.refused += 1
            return self.report(self.state())
        self.term, self.plan_number = term, plan.number
        for attempt in plan.stops:
            self.end(attempt, FinishReason.CANCELLED)
        for start in plan.starts:
            assert start.attempt not in self.sequences
            self.sequences[start.attempt] = SimSequence(start, list(start.accepted))
        return self.report(self.state()) if plan.send_state else None

    def end(self, attempt: AttemptId, reason: FinishReason) -> None:
        if attempt in self.sequences:
            sequence = self.sequences[attempt]
            self.drop(attempt)
            self.tell("completions", Completion(sequence.start.handle, reason, "", len(sequence.tokens)))

    def drop(self, attempt: AttemptId) -> None:
        self._hold(self.sequences.pop(attempt), NOTHING)

    def tell(self, name: str, said: object) -> None:
        self.news.setdefault(name, []).append(said)

    def step(self, chunk_tokens: int) -> list[SimSequence]:
        """Compute a little of everything; returns what samples a token, in order."""
        sampling = []
        for sequence in sorted(self.sequences.values(), key=lambda s: s.order):
            if sequence.is_paused and not self._may_enter(sequence):
                continue
            count = min(chunk_tokens, self._chunk_fits(), sequence.num_tokens - sequence.computed)
            if not self._make_room(sequence, count):
                continue
            sequence.computed += count
            self._hold(sequence, self._needed(sequence, 0))
            if sequence.computed >= len(sequence.start.prompt) and not sequence.prompt_told:
                sequence.prompt_told = True
                self.tell("prompts_done", sequence.start.handle)
            if sequence.computed == sequence.num_tokens:
                sampling.append(sequence)
        return [s for s in sampling if not s.is_paused]

    def _may_enter(self, sequence: SimSequence) -> bool:
        needed = self.limits.blocks_for(sequence.num_tokens + 1, CHUNK_TOKENS)
        alone = not any(s.blocks.full for s in self.sequences.values())
        sequence.is_paused = not needed.fits(self.free) and not alone
        return not sequence.is_paused

    def _make_room(self, sequence: SimSequence, count: int) -> bool:
        needed = self._needed(sequence, count)
        while not needed.minus(sequence.blocks).fits(self.free):
            last = max((s for s in self.sequences.values() if s.blocks.full), key=lambda s: s.order)
            self._hold(last, NOTHING)
            last.computed = 0
            last.is_paused = True
            self.tell("paused", last.start.attempt)
            if last is sequence:
                return False
        self._hold(sequence, needed)
        return True

    def _chunk_fits(self) -> int:
        limits = self.limits
        if not limits.sliding_window:
            return limits.tokens_max
        return (limits.sliding_blocks_total - 1) * limits.block_tokens + 1 - (limits.sliding_window - 1)

    def _needed(self, sequence: SimSequence, count: int) -> Blocks:
        """With `count` more tokens: all in the one space, in the other what is seen from the next one on."""
        window, size = self.limits.sliding_window, self.limits.block_tokens
        full = -(-(sequence.computed + count) // size)
        return Blocks(full, full - max(0, sequence.computed - window + 1) // size if window else 0)

    def _hold(self, sequence: SimSequence, blocks: Blocks) -> None:
        self.free = self.free.minus(blocks.minus(sequence.blocks))
        sequence.blocks = blocks
        assert NOTHING.fits(self.free)


@dataclass
class SimRequest:
    """A gateway's truth about one request."""

    num_prompt: int
    max_tokens: int
    priority: int
    tenant: str
    attempts: dict[int, int]
    accepted: dict[int, list[int]]
    is_admitted: bool = False
    deadline_s: float = math.inf
    ends: dict[int, str] = field(default_factory=dict)

    def end(self, index: int, how: str) -> None:
        assert index not in self.ends, f"ended twice: {self.ends[index]}, then {how}"
        self.ends[index] = how

    def open_indices(self) -> list[int]:
        return [index for index in self.attempts if index not in self.ends]


class SimGateway:
    def __init__(self, incarnation: Incarnation, clock: Callable[[], float]) -> None:
        self.incarnation, self.clock = incarnation, clock
        self.requests: dict[str, SimRequest] = {}
        self.is_welcome = False

    @property
    def address(self) -> str:
        return str(self.incarnation)

    def submission(self, request_id: str, indices: list[int], resume: bool) -> Submitted:
        request = self.requests[request_id]
        siblings = tuple(Sibling(i, request.attempts[i], i, tuple(request.accepted[i])) for i in indices)
        return Submitted(
            self.incarnation,
            submission(
                request_id,
                request.num_prompt,
                request.max_tokens,
                siblings,
                request.priority,
                resume,
                tenant=request.tenant,
                time_left_s=self._time_left_s(request),
            ),
        )

    def _time_left_s(self, request: SimRequest) -> float:
        return 0.0 if request.deadline_s == math.inf else max(request.deadline_s - self.clock(), 0.001)

    def open_sequences(self) -> list[tuple[str, int]]:
        return [(name, i) for name, request in self.requests.items() for i in request.open_indices()]

    def obey(self, order: Command) -> list[Event]:
        """What it answers."""
        match order:
            case Welcome() if not self.is_welcome:
                self.is_welcome = True
                return [
                    self.submission(name, request.open_indices(), resume=request.is_admitted)
                    for name, request in self.requests.items()
                    if request.open_indices()
                ]
            case Accept():
                self.requests[order.request_id].is_admitted = True
            case Reject():
                request = self.requests[order.request_id]
                assert not request.is_admitted, f"{order.request_id} was refused after it was accepted"
                for index in request.open_indices():
                    request.end(index, order.code.name)
            case CloseAttempt():
                return self._reopen(order)
        return []

    def _reopen(self, order: CloseAttempt) -> list[Event]:
        request_id, index, number = order.attempt
        request = self.requests[request_id]
        if index in request.ends or request.attempts[index] != number:
            return []
        if order.reason is CloseReason.DEADLINE:
            assert self.clock() >= request.deadline_s
            request.end(index, "DEADLINE")
            return []
        if order.reason is CloseReason.FAILED:
            assert "a sequence may have at most" in order.detail
            request.end(index, "TOO_LARGE")
            return []
        request.attempts[index] += 1
        return [self.submission(request_id, [index], resume=True)]

    def take(self, attempt: AttemptId, position: int, token: int, finish: FinishReason | None) -> bool:
        """A worker's token; False when it is not wanted."""
        request = self.requests.get(attempt.request_id)
        if request is None or attempt.index in request.ends:
            return False
        accepted = request.accepted[attempt.index]
        if request.attempts[attempt.index] != attempt.number:
            return False
        assert position <= len(accepted), f"{attempt}: position {position} skips {len(accepted)}"
        if position == len(accepted):
            accepted.append(token)
            assert token == token_at(attempt.request_id, attempt.index, position)
            assert len(accepted) <= request.max_tokens
            if finish is not None:
                request.end(attempt.index, finish.name)
        return True

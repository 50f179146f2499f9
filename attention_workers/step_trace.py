"""Where the time of steps goes: bounded rings of what each layer and microbatch took. Always kept.

The compute thread writes, some microseconds per layer; from any other thread a snapshot is a copy.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import numpy as np

from attention_workers.microbatch_choice import Phases, StepKind
from attention_workers.trace_records import (
    EXCHANGE,
    NOBODY,
    REPLY,
    STEP,
    Fields,
    Records,
    Snapshot,
    dtype_of,
    struct_of,
)
from router.dispatcher import Heard
from router.placement import Member

STEPS_MAX, EXCHANGES_MAX, REPLIES_MAX = 1 << 13, 1 << 15, 1 << 16
PEERS_MAX = 1 << 12
_RECENT = 0.05  # weight of the newest step in the shares that status shows


class _Ring:
    """The newest records, in memory that is taken once."""

    def __init__(self, fields: Fields, capacity: int) -> None:
        self._struct, self._dtype = struct_of(fields), dtype_of(fields)
        self._bytes = bytearray(self._struct.size * capacity)
        self._capacity = capacity
        self._count = 0  # ever put

    def put(self, *values: int) -> None:
        self._struct.pack_into(self._bytes, self._count % self._capacity * self._struct.size, *values)
        self._count += 1

    @property
    def is_full(self) -> bool:
        return self._count >= self._capacity

    def copy(self) -> Records:
        """In no order: the writer goes on."""
        count = min(self._count, self._capacity)
        return np.frombuffer(bytes(self._bytes), self._dtype)[:count]


class Exchange(Protocol):
    """What a dispatcher says of its last combine."""

    waited_ns: int
    heard: list[Heard]


class _Exposed(NamedTuple):
    """What kept one combine waiting."""

    last: int  # peer
    last_by_ns: int
    experts_ns: int  # of the wait


class StepTrace:
    """Of one attention worker. Each step: `begin`, then `dispatched` and `combined` in turn, then `end`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._steps, self._exchanges = _Ring(STEP, STEPS_MAX), _Ring(EXCHANGE, EXCHANGES_MAX)
        self._replies = _Ring(REPLY, REPLIES_MAX)
        self._peers: dict[Member, int] = {}
        self._number = 0
        self._kind, self._rows, self._sequences = StepKind("decode", 1), 0, 0
        self._began_ns = 0
        self._open: dict[int, tuple[int, int, int]] = {}  # microbatch -> attention began, took; dispatch took
        self._forget_sums()
        self.wait_share = self.exchange_share = 0.0  # of recent steps' time: waited, and of that exchange

    def _forget_sums(self) -> None:
        self._attention_ns = self._experts_ns = self._exchange_ns = self._count = 0
        self._wait_ns = self._wait_exchange_ns = 0

    def begin(self, kind: StepKind, rows: int, sequences: int) -> None:
        self._number += 1  # also after a step that was given up, which leaves no record
        self._kind, self._rows, self._sequences = kind, rows, sequences
        self._open.clear()
        self._forget_sums()
        self._began_ns = time.perf_counter_ns()

    def dispatched(self, microbatch: int, from_ns: int, attended_ns: int) -> None:
        """Attention of a layer began at `from_ns` and ended at `attended_ns`; dispatch has just ended."""
        now_ns = time.perf_counter_ns()
        self._open[microbatch] = from_ns, attended_ns - from_ns, now_ns - attended_ns

    def combined(self, layer: int, microbatch: int, from_ns: int) -> None:
        """Its combine began at `from_ns` and has just ended."""
        wait_ns, heard = self._exchange.waited_ns, self._exchange.heard
        merge_ns = time.perf_counter_ns() - from_ns - wait_ns
        attended_from_ns, attend_ns, dispatch_ns = self._open.pop(microbatch)
        for reply in heard:
            self._replies.put(self._number, reply.sent_ns, reply.heard_ns, *reply.spent, layer,
                              self._peer(reply.peer), microbatch)  # fmt: skip
        exposed = self._exposed(from_ns, wait_ns, heard)
        self._exchanges.put(self._number, attended_from_ns, attend_ns, dispatch_ns, from_ns, wait_ns, merge_ns,
                            exposed.last_by_ns, exposed.experts_ns, layer, exposed.last, microbatch)  # fmt: skip
        self._attention_ns += attend_ns + dispatch_ns + merge_ns
        self._count += 1
        self._wait_ns += wait_ns
        self._wait_exchange_ns += wait_ns - exposed.experts_ns

    def _peer(self, member: Member) -> int:
        index = self._peers.get(member)
        if index is None:
            index = min(len(self._peers), PEERS_MAX - 1)  # lives beyond these share the last name
            if index == len(self._peers):
                self._peers[member] = index
        return index

    def _exposed(self, from_ns: int, wait_ns: int, heard: list[Heard]) -> _Exposed:
        """The wait is the tail of the last reply's flight: half of its exchange comes last, the worker before it.

        Links are taken to be as slow one way as the other. What lies in a link while the worker computes something
        else counts as exchange.
        """
        if not heard:
            return _Exposed(NOBODY, 0, 0)
        last = max(heard, key=_heard_ns) if len(heard) > 1 else heard[0]
        before_ns = max((reply.heard_ns for reply in heard if reply is not last), default=from_ns)
        at_worker_ns = last.spent.queued_ns + last.spent.computed_ns
        exchange_ns = max(0, last.heard_ns - last.sent_ns - at_worker_ns)
        self._experts_ns += last.spent.computed_ns
        self._exchange_ns += exchange_ns
        back_ns = min(wait_ns, exchange_ns // 2)
        last_by_ns = max(0, last.heard_ns - max(before_ns, from_ns))
        return _Exposed(self._peer(last.peer), last_by_ns, min(wait_ns - back_ns, at_worker_ns))

    def end(self, microbatches: int) -> Phases:
        ended_ns = time.perf_counter_ns()
        self._steps.put(self._number, self._began_ns, ended_ns, self._rows, self._sequences,
                        self._kind.name == "prefill", microbatches)  # fmt: skip
        took_ns, count = max(1, ended_ns - self._began_ns), max(1, self._count)
        self.wait_share += _RECENT * (self._wait_ns / took_ns - self.wait_share)
        self.exchange_share += _RECENT * (self._wait_exchange_ns / took_ns - self.exchange_share)
        return Phases(took_ns, self._attention_ns / count, self._experts_ns / count, self._exchange_ns / count)

    def snapshot(self, worker: str, choices: tuple[dict[str, Any], ...] = ()) -> Snapshot:
        """Whole steps that have ended. From any thread."""
        rings = self._steps, self._exchanges, self._replies
        steps, exchanges, replies = (ring.copy() for ring in rings)
        peers = tuple(f"{member.id}#{member.incarnation}" for member in list(self._peers))
        partial = [int(part["step"].min()) for ring, part in zip(rings[1:], (exchanges, replies), strict=True)
                   if ring.is_full]  # fmt: skip
        steps = np.sort(steps[steps["number"] > max(partial, default=0)], order="number")
        exchanges, replies = (_of(part, steps) for part in (exchanges, replies))
        has_forgotten = any(ring.is_full for ring in rings)
        return Snapshot(worker, time.perf_counter_ns(), peers, steps, exchanges, replies, choices, has_forgotten)


def _of(part: Records, steps: Records) -> Records:
    """The records of these steps, by step, else in the order in which they were put."""
    part = part[np.isin(part["step"], steps["number"])]
    return part[np.argsort(part["step"], kind="stable")]


def _heard_ns(reply: Heard) -> int:
    return reply.heard_ns

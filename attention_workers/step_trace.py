"""Where the time of steps goes: bounded rings of what each layer and microbatch took. Always kept.

The compute thread writes, some microseconds per layer; from any other thread a snapshot is a copy.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

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

STEPS_MAX, EXCHANGES_MAX, REPLIES_MAX = 1 << 13, 1 << 15, 1 << 16
PEERS_MAX = 1 << 12
_RECENT = 0.05  # weight of the newest step in the shares that status shows


class _Ring:
    """The newest records, in memory that is taken once."""

    def __init__(self, fields: Fields, capacity: int) -> None:
        self._struct, self._dtype = struct_of(fields), dtype_of(fields)
        self._bytes = bytearray(self._struct.size * capacity)
        self._at = 0  # where the next goes, in bytes
        self.is_full = False

    def put(self, *values: int) -> None:
        at = self._at
        self._struct.pack_into(self._bytes, at, *values)
        at += self._struct.size
        if at == len(self._bytes):
            at, self.is_full = 0, True
        self._at = at

    def copy(self) -> Records:
        """In no order: the writer goes on."""
        at, is_full, copied = self._at, self.is_full, bytes(self._bytes)
        return np.frombuffer(copied if is_full else copied[:at], self._dtype)


class Exchange(Protocol):
    """What a dispatcher says of its last combine."""

    waited_ns: int
    heard: list[Heard]


class StepTrace:
    """Of one attention worker. Each step: `begin`, then `dispatched` and `combined` in turn, then `end`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._steps, self._exchanges = _Ring(STEP, STEPS_MAX), _Ring(EXCHANGE, EXCHANGES_MAX)
        self._replies = _Ring(REPLY, REPLIES_MAX)
        self._peers: dict[tuple[str, int], int] = {}  # by id and incarnation
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
        wait_ns = self._exchange.waited_ns
        merge_ns = time.perf_counter_ns() - from_ns - wait_ns
        attended_from_ns, attend_ns, dispatch_ns = self._open.pop(microbatch)
        last, last_heard_ns, before_ns, at_worker_ns, exchange_ns = NOBODY, from_ns, from_ns, 0, 0
        for peer, sent_ns, heard_ns, (queued_ns, computed_ns) in self._exchange.heard:
            index = self._peers.get((peer.id, peer.incarnation))
            if index is None:
                index = self._new_peer((peer.id, peer.incarnation))
            self._replies.put(self._number, sent_ns, heard_ns, queued_ns, computed_ns, layer, index, microbatch)
            if heard_ns >= last_heard_ns or last == NOBODY:
                before_ns, last_heard_ns, last = last_heard_ns, heard_ns, index
                at_worker_ns, last_computed_ns = queued_ns + computed_ns, computed_ns
                exchange_ns = max(0, heard_ns - sent_ns - at_worker_ns)
            elif heard_ns > before_ns:
                before_ns = heard_ns
        if last != NOBODY:
            self._experts_ns += last_computed_ns
            self._exchange_ns += exchange_ns
        # The wait is the tail of the last reply's flight: half of its exchange comes last, the worker before it.
        # Links are taken to be as slow one way as the other; what lies in a link while the worker computes for
        # others counts as exchange.
        experts_ns = min(max(0, wait_ns - exchange_ns // 2), at_worker_ns)
        last_by_ns = max(0, last_heard_ns - max(before_ns, from_ns))
        self._exchanges.put(self._number, attended_from_ns, attend_ns, dispatch_ns, from_ns, wait_ns, merge_ns,
                            last_by_ns, experts_ns, layer, last, microbatch)  # fmt: skip
        self._attention_ns += attend_ns + dispatch_ns + merge_ns
        self._count += 1
        self._wait_ns += wait_ns
        self._wait_exchange_ns += wait_ns - experts_ns

    def _new_peer(self, peer: tuple[str, int]) -> int:
        index = min(len(self._peers), PEERS_MAX - 1)  # lives beyond these share the last name
        if index == len(self._peers):
            self._peers[peer] = index
        return index

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
        peers = tuple(f"{name}#{incarnation}" for name, incarnation in list(self._peers))
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

"""What crossing from one process to another costs, by kind of link: the way there and back, many parcels in
flight, and how fast four megabytes come into another process's hands.

The expert end is a process of its own (for `local`: a thread, as there is nothing to cross) and computes nothing:
it gives back the rows that came. Beside every large parcel the same bytes are copied within this process, in turn,
so that both see the same machine.

Legend: n rows, each with one route · H hidden.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import BenchmarkError
from benchmarks.samples import Samples
from benchmarks.spawned import spawned
from router.config import RouterConfig
from router.errors import RouterError
from router.placement import EpochId, Member
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Peer, Reply
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end

LARGE_BYTES = 4 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_CONFIG = RouterConfig(link_bytes_max=64 << 20, rows_max=1 << 16, experts_per_row_max=1)
_EXPERT, _ATTENTION = Member("expert", 1), Member("attention", 1)
_TURN_S = 0.2
_START_S = 120.0
_REPLY_S = 20.0
_ECHO, _CLOCK = 0, 1  # `layer` of a parcel says what is wanted in reply: its rows, or when they were there


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.rows * self.hidden * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    round_trips: int = 2000
    in_flight: int = 8
    """Parcels under way at once, in the measurement of many."""
    large: int = 100
    """Parcels of four megabytes."""


@dataclass(frozen=True)
class Crossing:
    """One shape over one kind of link."""

    kind: str
    shape: Shape
    round_trip_us: Samples
    in_flight: int
    parcels_per_s: float  # with so many in flight


@dataclass(frozen=True)
class Bandwidth:
    """Four megabytes one way, GB/s (10^9): in the other's hands, in place; read through by it; memcpy beside."""

    kind: str
    one_way: Samples
    read_through: Samples
    memcpy: Samples

    @property
    def of_memcpy(self) -> float:
        return self.one_way.p50 / self.memcpy.p50


def measure(
    kinds: list[str], shapes: list[Shape], effort: Effort, say: Callable[[str], None]
) -> tuple[list[Crossing], list[Bandwidth]]:
    """`say` is told of each measurement as it begins. Raises BenchmarkError."""
    crossings, bandwidths = [], []
    for kind in kinds:
        for shape in shapes:
            say(f"{kind}: {shape.rows} x {shape.hidden} {shape.dtype}, {effort.round_trips} round trips")
            with _linked(kind, shape) as exchange:
                crossings.append(exchange.cross(effort))
        if kind != "local":  # which hands parcels over: nothing is carried
            say(f"{kind}: {LARGE_BYTES >> 20} MB one way, {effort.large} times")
            with _linked(kind, Shape(LARGE_BYTES // 1536, 768, "bfloat16")) as exchange:
                bandwidths.append(exchange.carry(effort.large))
    return crossings, bandwidths


class _Exchange:
    """The attention end, linked to an expert that answers."""

    def __init__(self, kind: str, end: AttentionEnd, shape: Shape) -> None:
        self._kind, self._end, self._shape = kind, end, shape
        generator = torch.Generator().manual_seed(1)
        self._rows = torch.randn(shape.rows, shape.hidden, generator=generator).to(DTYPES[shape.dtype])
        self._tickets = 0

    def cross(self, effort: Effort) -> Crossing:
        routes = torch.arange(self._shape.rows, dtype=torch.int32)
        self._trip(routes, _ECHO, self._check)
        times_us = [self._trip(routes, _ECHO) / 1e3 for _ in range(effort.round_trips + 50)][50:]
        rate = self._many(routes, effort)
        return Crossing(self._kind, self._shape, Samples.of(times_us), effort.in_flight, rate)

    def carry(self, count: int) -> Bandwidth:
        """One row comes back, and says when all rows were there."""
        one, copied = torch.zeros(1, dtype=torch.int32), torch.empty_like(self._rows)
        seen: dict[str, list[float]] = {"there": [], "read": [], "copied": []}

        def note(rows: Tensor) -> None:
            began, there, read, checksum = rows.view(torch.int64)[0, :4].tolist()
            if checksum != expected:
                raise BenchmarkError(f"{self._kind}: {LARGE_BYTES} bytes did not arrive as they were sent")
            seen["there"].append(self._shape.nbytes / (there - began))
            seen["read"].append(self._shape.nbytes / (read - began))

        expected = _checksum(self._rows)
        for _ in range(count + 5):
            began_ns = time.monotonic_ns()
            ctypes.memmove(copied.data_ptr(), self._rows.data_ptr(), self._shape.nbytes)
            seen["copied"].append(self._shape.nbytes / (time.monotonic_ns() - began_ns))
            self._rows.view(torch.int64)[0, 0] = time.monotonic_ns()  # the expert's clock is the same
            self._trip(one, _CLOCK, note)
        there, read, memcpy = (Samples.of(values[5:]) for values in seen.values())
        return Bandwidth(self._kind, there, read, memcpy)

    def _trip(self, routes: Tensor, wanted: int, see: Callable[[Tensor], None] = lambda _: None) -> int:
        """Nanoseconds there and back."""
        began_ns = time.monotonic_ns()
        ticket = self._end.dispatch([self._parcel(routes, wanted)])
        [outcome] = self._end.combine(ticket, _REPLY_S)
        took_ns = time.monotonic_ns() - began_ns
        if not isinstance(outcome, Reply):
            raise BenchmarkError(f"{self._kind}: {outcome.reason.name}, {outcome.detail}")
        see(outcome.rows)
        self._end.release(ticket)
        return took_ns

    def _check(self, rows: Tensor) -> None:
        if not torch.equal(rows, self._rows):
            raise BenchmarkError(f"{self._kind}: the rows did not come back as they were sent")

    def _many(self, routes: Tensor, effort: Effort) -> float:
        """Parcels a second with so many in flight; the oldest is combined first."""
        flying: deque[Any] = deque()
        began_s = time.monotonic()
        for number in range(effort.round_trips + effort.in_flight):
            if len(flying) == effort.in_flight or number >= effort.round_trips:
                self._end.combine(flying[0], _REPLY_S)
                self._end.release(flying.popleft())
            if number < effort.round_trips:
                flying.append(self._end.dispatch([self._parcel(routes, _ECHO)]))
        return effort.round_trips / (time.monotonic() - began_s)

    def _parcel(self, routes: Tensor, wanted: int) -> Parcel:
        self._tickets += 1
        return Parcel(_ATTENTION, _EXPERT, EpochId(1, 1), self._tickets, wanted, self._rows, routes, routes)


# --- the expert ----------------------------------------------------------------------------------


def expert_process(pipe: Connection, kind: str, identity: LinkIdentity) -> None:
    """Tells its address, then answers until killed."""
    torch.set_num_threads(1)
    end = expert_end(kind, identity, _CONFIG)
    pipe.send(end.address)
    while not pipe.poll():
        _answer(end, _TURN_S)


def _answer(end: ExpertEnd, wait_s: float) -> None:
    while (parcel := end.receive(wait_s)) is not None:
        there_ns = time.monotonic_ns()
        if parcel.layer == _ECHO:
            end.reply(parcel, parcel.rows)
            continue
        checksum = _checksum(parcel.rows)
        told = torch.zeros(1, parcel.rows.shape[1], dtype=parcel.rows.dtype)
        began_ns = int(parcel.rows.view(torch.int64)[0, 0])
        told.view(torch.int64)[0, :4] = torch.tensor([began_ns, there_ns, time.monotonic_ns(), checksum])
        end.reply(parcel, told)


def _checksum(rows: Tensor) -> int:
    """Reads every byte but those of the first row, where the time is."""
    return int(rows[1:].view(torch.int64).sum())


@contextlib.contextmanager
def _linked(kind: str, shape: Shape) -> Iterator[_Exchange]:
    expert, attention = (
        LinkIdentity(member, "benchmark", "", shape.hidden, DTYPES[shape.dtype])
        for member in (_EXPERT, _ATTENTION)
    )
    hub = LocalHub()
    with contextlib.ExitStack() as stack:
        if kind == "local":
            address = stack.enter_context(_expert_thread(expert, hub))
        else:
            child = stack.enter_context(spawned(f"{kind} expert", expert_process, kind, expert))
            address = child.hear(_START_S)
        try:
            end = attention_end(kind, attention, _CONFIG, hub)
            stack.callback(end.close)
            failed = end.adopt(end.prepare([Peer(_EXPERT, address)], _REPLY_S))
        except RouterError as error:
            raise BenchmarkError(f"{kind}: {error}") from error
        if failed:
            raise BenchmarkError(f"{kind}: {failed[_EXPERT]}")
        yield _Exchange(kind, end, shape)


@contextlib.contextmanager
def _expert_thread(identity: LinkIdentity, hub: LocalHub) -> Iterator[str]:
    end = expert_end("local", identity, _CONFIG, hub)
    leaving = threading.Event()

    def answer() -> None:
        while not leaving.is_set():
            _answer(end, _TURN_S)

    thread = threading.Thread(target=answer, name="benchmark-expert")
    thread.start()
    try:
        yield end.address
    finally:
        leaving.set()
        end.wake()
        thread.join()
        end.close()

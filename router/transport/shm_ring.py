"""Two rings in anonymous shared memory: frames from one process to another, in place.

Each ring has one producer and one consumer, room for frames, and a queue of entries that say where they lie.
Two counters only grow: `head`, frames published, and `tail`, frames given back, in order. The producer alone
decides where a frame lies: contiguous, behind the newest, or else at the beginning; and at the beginning
whenever the ring is empty, so that a lightly used link keeps touching the same few warm pages, and only those
are ever resident.

Room. Frames are given room in order and given back in order. If their sum is kept to half of the ring, there
is always room: what is lost at the end of the ring is less than the first frame behind it.

Order. The producer stores the frame, its entry, then `head`; the consumer loads `head`, the entry, then the
frame. CPython does not reorder its operations, a store to an aligned 8-byte view is one instruction, and
x86-64 keeps stores in order and loads in order (total store order). Elsewhere fences would be needed:
`map_segment` refuses.

Trust. What the peer wrote is read once, and checked before use; the memory is sealed against shrinking, so
that touching it cannot fault. No waiting here, and no bells.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from router.config import PAGE_BYTES
from router.errors import LinkRefused, RingError
from router.transport.link import Span

ENTRIES = PAGE_BYTES // 8  # frames in one ring, at most
_LINE = 64  # frames begin and counters lie on cache lines of their own; entries count in lines
_LENGTH_BITS = 32  # an entry: lines from the ring's beginning, then length in lines
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def aligned(nbytes: int) -> int:
    """What a frame of `nbytes` occupies."""
    return (nbytes + _LINE - 1) & -_LINE


def create_segment(ring_bytes: int) -> int:
    """A sealed memfd for both directions. The caller closes it."""
    fd = os.memfd_create("expertmesh-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _segment_bytes(ring_bytes))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class RingMemory(NamedTuple):
    """One direction. There is no close: views of frames may outlive the link, and the mapping goes with the
    last of them."""

    frames: memoryview  # [ring_bytes]
    entries: memoryview  # [ENTRIES] uint64
    head: memoryview  # [1] uint64
    tail: memoryview  # [1] uint64


@dataclass(frozen=True)
class Segment:
    parcels: RingMemory
    replies: RingMemory
    pulses: memoryview  # [1] uint64: grows while the expert end is at work; its peer only compares


def map_segment(fd: int, ring_bytes: int) -> Segment:
    """Raises LinkRefused if `fd` is not what `create_segment` makes, or this machine cannot keep the order."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise LinkRefused(f"shm: machine {platform.machine()}; needs x86-64's order of stores: use grpc")
    expected = _segment_bytes(ring_bytes)
    try:
        size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise LinkRefused("shm: not a memfd") from error
    if size != expected or seals & fcntl.F_SEAL_SHRINK == 0:
        raise LinkRefused(f"shm: {size} bytes, seals {seals}; must be {expected}, sealed against shrinking")
    view = memoryview(mmap.mmap(fd, size))
    pulses = view[4 * _LINE : 4 * _LINE + 8].cast("Q")
    return Segment(_ring_memory(view, 0, ring_bytes), _ring_memory(view, 1, ring_bytes), pulses)


def _ring_memory(view: memoryview, ring: int, ring_bytes: int) -> RingMemory:
    """A page of counters, a page of entries for each ring, then the rings."""
    counters_at, entries_at = 2 * ring * _LINE, (1 + ring) * PAGE_BYTES
    frames_at = 3 * PAGE_BYTES + ring * ring_bytes
    return RingMemory(
        frames=view[frames_at : frames_at + ring_bytes],
        entries=view[entries_at : entries_at + PAGE_BYTES].cast("Q"),
        head=view[counters_at : counters_at + 8].cast("Q"),
        tail=view[counters_at + _LINE : counters_at + _LINE + 8].cast("Q"),
    )


def _segment_bytes(ring_bytes: int) -> int:
    if ring_bytes <= 0 or ring_bytes % PAGE_BYTES:
        raise LinkRefused(f"ring_bytes: {ring_bytes}; must be a positive multiple of {PAGE_BYTES}")
    return 3 * PAGE_BYTES + 2 * ring_bytes


class RingWriter:
    """The producer. `claim` room, write the frame there, `publish`."""

    def __init__(self, memory: RingMemory) -> None:
        self.size = len(memory.frames)
        self._memory = memory
        self._published = 0
        self._given_back = 0
        self._frames: deque[tuple[int, int]] = deque()  # (offset, end) of those not given back
        self._claimed = (0, 0)

    def claim(self, nbytes: int) -> int | None:
        """Offset of room for one frame, or None while there is none. Nothing is visible before `publish`."""
        self._forget_given_back()
        frames, nbytes = self._frames, aligned(nbytes)
        offset, limit = 0, self.size
        if frames:
            (oldest, _), (newest, offset) = frames[0], frames[-1]
            if newest < oldest:
                limit = oldest
            elif offset + nbytes > limit:
                offset, limit = 0, oldest
        if offset + nbytes > limit or len(frames) == ENTRIES:
            return None
        self._claimed = (offset, offset + nbytes)
        return offset

    def publish(self) -> None:
        offset, end = self._claimed
        self._frames.append(self._claimed)
        entry = offset // _LINE << _LENGTH_BITS | (end - offset) // _LINE
        self._memory.entries[self._published % ENTRIES] = entry
        self._published += 1
        self._memory.head[0] = self._published

    def _forget_given_back(self) -> None:
        tail = self._memory.tail[0]
        if not self._given_back <= tail <= self._published:
            raise RingError(f"ring: tail {tail}; must be {self._given_back} to {self._published}")
        for _ in range(tail - self._given_back):
            self._frames.popleft()
        self._given_back = tail


class RingReader:
    """The consumer. `next` finds a frame, `take` passes it, `free` gives its room back, in any order."""

    def __init__(self, memory: RingMemory) -> None:
        self.held_bytes = 0  # of frames taken and not given back, freed ones behind others included
        self._memory = memory
        self._size = len(memory.frames)
        self._taken = 0
        self._given_back = 0
        self._spans: deque[Span] = deque()  # taken and not given back

    @property
    def held_frames(self) -> int:
        return len(self._spans)

    @property
    def has_more(self) -> bool:
        """Whether any frame is held, or published and not yet taken."""
        return bool(self._spans) or self._memory.head[0] != self._taken

    def next(self) -> tuple[int, int] | None:
        """(offset, bytes) of the next frame; None if nothing is published."""
        head = self._memory.head[0]
        if head == self._taken:
            return None
        if not self._taken < head <= self._given_back + ENTRIES:
            raise RingError(f"ring: head {head}; must be {self._taken} to {self._given_back + ENTRIES}")
        entry = self._memory.entries[self._taken % ENTRIES]
        offset, nbytes = (entry >> _LENGTH_BITS) * _LINE, (entry & _LENGTH_MASK) * _LINE
        if offset + nbytes > self._size:
            raise RingError(f"ring: a frame at {offset}, of {nbytes} bytes; the ring has {self._size}")
        return offset, nbytes

    def take(self, nbytes: int) -> Span:
        """Pass the frame that `next` found."""
        span = Span(nbytes)
        self._taken += 1
        self.held_bytes += nbytes
        self._spans.append(span)
        return span

    def free(self, span: Span) -> None:
        """Idempotent."""
        span.freed = True
        spans = self._spans
        while spans and spans[0].freed:
            self.held_bytes -= spans.popleft().nbytes
            self._given_back += 1
        self._memory.tail[0] = self._given_back

"""Rings: frames come out as they went in, a half-full ring always has room, and no counter is believed."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator

import pytest

from router.config import PAGE_BYTES, link_bytes_needed
from router.errors import LinkRefused, RingError
from router.transport.shm_ring import (
    ENTRIES,
    RingMemory,
    RingReader,
    RingWriter,
    Segment,
    Span,
    aligned,
    create_segment,
    map_segment,
)

SIZE = PAGE_BYTES


@pytest.fixture
def segment() -> Iterator[Segment]:
    fd = create_segment(SIZE)
    yield map_segment(fd, SIZE)
    os.close(fd)


def put(memory: RingMemory, writer: RingWriter, words: bytes) -> bool:
    offset = writer.claim(len(words))
    if offset is None:
        return False
    memory.frames[offset : offset + len(words)] = words
    writer.publish()
    return True


def take(memory: RingMemory, reader: RingReader, length: int) -> tuple[bytes, Span]:
    found = reader.next()
    assert found is not None
    offset, nbytes = found
    assert nbytes == aligned(length)
    return bytes(memory.frames[offset : offset + length]), reader.take(nbytes)


@pytest.mark.parametrize("seed", range(30))
def test_frames_come_out_as_they_went_in_and_half_a_ring_always_has_room(segment: Segment, seed: int) -> None:
    """The capacity argument at the head of shm_ring: the attention end promises half, so replies always fit."""
    chance = random.Random(seed)
    writer = RingWriter(segment.replies)
    reader = RingReader(segment.replies)
    frame_bytes_max = chance.choice([64, 300, SIZE // 4, SIZE // 2])
    sent: deque[bytes] = deque()
    held: list[Span] = []
    promised = 0  # of frames written and not yet read
    for number in range(400):
        if chance.random() < 0.5:
            words = bytes([number % 256]) * chance.randint(1, frame_bytes_max)
            if promised + reader.held_bytes + aligned(len(words)) <= SIZE // 2:
                assert put(segment.replies, writer, words), f"no room for {len(words)} bytes"
                sent.append(words)
                promised += aligned(len(words))
        elif chance.random() < 0.6 and sent:
            words = sent.popleft()
            promised -= aligned(len(words))
            read, span = take(segment.replies, reader, len(words))
            assert read == words
            held.append(span)
        elif held:
            reader.free(held.pop(chance.randrange(len(held))))
    assert (reader.next() is None) == (not sent)


def test_room_is_given_back_in_order_whatever_the_order_of_freeing(segment: Segment) -> None:
    """A frame held back holds back those behind it: nothing is overwritten under its reader."""
    writer, reader = RingWriter(segment.parcels), RingReader(segment.parcels)
    quarter = SIZE // 4
    assert all(put(segment.parcels, writer, bytes([number]) * quarter) for number in range(4))
    spans = [take(segment.parcels, reader, quarter)[1] for _ in range(4)]
    for span in reversed(spans[1:]):
        reader.free(span)
        assert not put(segment.parcels, writer, b"x" * quarter)
    reader.free(spans[0])
    assert put(segment.parcels, writer, b"x" * SIZE)


def test_a_lightly_used_ring_stays_at_its_beginning(segment: Segment) -> None:
    """What is never touched is never resident: death is noticed sooner, caches stay warm."""
    writer, reader = RingWriter(segment.parcels), RingReader(segment.parcels)
    for _ in range(ENTRIES + 3):
        assert put(segment.parcels, writer, b"y" * 500)
        reader.free(take(segment.parcels, reader, 500)[1])
    assert bytes(segment.parcels.frames[500:]).strip(b"\0") == b""


def test_entries_are_bounded_too() -> None:
    """Many small frames fill the queue before the room."""
    fd = create_segment(64 * 2 * ENTRIES)
    large = map_segment(fd, 64 * 2 * ENTRIES).parcels
    os.close(fd)
    writer, reader = RingWriter(large), RingReader(large)
    assert all(put(large, writer, b"z") for _ in range(ENTRIES))
    assert not put(large, writer, b"z")
    reader.free(take(large, reader, 1)[1])
    assert put(large, writer, b"z")


@pytest.mark.parametrize("head", [ENTRIES + 1, 2**64 - 1])
def test_a_head_that_cannot_be_is_refused(segment: Segment, head: int) -> None:
    """A reader that followed it would read what was never written."""
    reader = RingReader(segment.parcels)
    segment.parcels.head[0] = head
    with pytest.raises(RingError, match=f"head {head}"):
        reader.next()


@pytest.mark.parametrize("entry", [SIZE // 64 << 32 | 1, SIZE // 64 + 1, 2**64 - 1])
def test_an_entry_outside_the_ring_is_refused(segment: Segment, entry: int) -> None:
    """A reader that followed it would leave the memory."""
    segment.parcels.entries[0] = entry
    segment.parcels.head[0] = 1
    with pytest.raises(RingError, match="the ring has"):
        RingReader(segment.parcels).next()


@pytest.mark.parametrize("tail", [1, 2**64 - 1])
def test_a_tail_that_cannot_be_is_refused(segment: Segment, tail: int) -> None:
    """A writer that believed it would overwrite what is being read."""
    segment.parcels.tail[0] = tail
    with pytest.raises(RingError, match=f"tail {tail}"):
        RingWriter(segment.parcels).claim(1)


def test_only_our_kind_of_memory_is_mapped() -> None:
    """Memory that can shrink would fault us; other sizes would mislead the rings."""
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 3 * PAGE_BYTES + 2 * SIZE)
    with pytest.raises(LinkRefused, match="sealed against shrinking"):
        map_segment(fd, SIZE)
    os.close(fd)
    fd = create_segment(SIZE)
    with pytest.raises(LinkRefused, match=f"must be {3 * PAGE_BYTES + 4 * SIZE}"):
        map_segment(fd, 2 * SIZE)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 0)
    os.close(fd)
    fd = os.eventfd(0)
    with pytest.raises(LinkRefused, match="not a memfd"):
        map_segment(fd, SIZE)
    os.close(fd)
    with pytest.raises(LinkRefused, match="ring_bytes: 100"):
        create_segment(100)


def test_the_needed_ring_holds_the_promised_replies_in_half() -> None:
    """So that a config derived from the model never meets OVERLOADED in ordinary work."""
    needed = link_bytes_needed(rows=512, experts_per_row=8, hidden=768, element_bytes=2, parcels=16)
    assert needed % PAGE_BYTES == 0
    assert needed // 2 >= 512 * 8 * 768 * 2 + 16 * 128

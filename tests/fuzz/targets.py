"""What is fuzzed: each target takes a stranger's bytes through one parser, and fails if that breaks a promise.

The promises: nothing but the parser's own refusal is raised, what is accepted lies within the bytes and the
limits, and no case takes more memory than its target allows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from router.config import PAGE_BYTES, RouterConfig
from router.errors import FrameError, LinkRefused, RingError, TransportError
from router.placement import EpochId, Member
from router.transport import frame
from router.transport.base import UNTIMED, LinkIdentity, Parcel, Peer, RefusalReason
from router.transport.grpc_door import GrpcExpertLink
from router.transport.grpc_stream import FRAMES_MAX, FrameStream
from router.transport.handshake import Welcome, hello, refuse_unless_welcome, why_refused
from router.transport.link import occupied_bytes_max
from router.transport.shm_bell import new_bell
from router.transport.shm_handshake import answer
from router.transport.shm_link import ShmAttentionLink, ShmExpertLink, Wiring
from router.transport.shm_ring import ENTRIES, RingReader, RingWriter, Segment, _ring_memory, create_segment
from router.transport.wire import (
    HELLO_BYTES_MAX,
    hello_from_bytes,
    hello_to_bytes,
    welcome_from_bytes,
    welcome_to_bytes,
)
from tests.fuzz.gateway_targets import READERS

CONFIG = RouterConfig(rows_max=8, experts_per_row_max=2, link_bytes_max=PAGE_BYTES, parcels_in_flight_max=4)
OWN = LinkIdentity(Member("expert-0", 6), "0123456789abcdef", "swordfish", 3, torch.bfloat16)
THEIRS = LinkIdentity(Member("attention-0", 5), "0123456789abcdef", "swordfish", 3, torch.bfloat16)
LIMITS = frame.limits_of(OWN, CONFIG)
ENCODED = frame.limits_of(replace(OWN, rows="fp8", replies="sums"), CONFIG)
_LINE = 64


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]  # to begin with, behind the first checks
    memory_max: int  # bytes of Python objects that one case may take


def _parcel(num_rows: int, *route_rows: int) -> Parcel:
    rows = torch.arange(num_rows * 3, dtype=torch.bfloat16).view(num_rows, 3)
    routes = torch.tensor(route_rows, dtype=torch.int32)
    return Parcel(THEIRS.member, OWN.member, EpochId(7, 8), 9, 10, rows, routes, routes + 40)


PARCELS = tuple(frame.parcel_message(one, 0, LIMITS) for one in (_parcel(3, 2, 0, 1, 1), _parcel(0), _parcel(8)))
ANSWERS = (
    frame.reply_message(_parcel(2, 0, 1), 0, torch.zeros(2, 3, dtype=torch.bfloat16), UNTIMED, LIMITS),
    frame.refusal_message(_parcel(2, 0, 1), 0, RefusalReason.NOT_RESIDENT, b"slot 3", LIMITS),
)
_CODES = torch.zeros(2, ENCODED.sent_width, dtype=torch.bfloat16)
_WEIGHED = replace(_parcel(2, 0, 1, 1), rows=_CODES, route_weights=torch.ones(3))
FRAMES = (
    *(b"\x80" + one for one in PARCELS + ANSWERS),
    b"\0" + PARCELS[0][len(LIMITS.prefix) :],
    b"\xc0" + frame.parcel_message(_WEIGHED, 0, ENCODED),
)


def read_frame(data: bytes) -> None:
    """The first byte says which link it comes over, and whether that link's own prefix stands before the rest."""
    what = data[0] if data else 0
    limits = ENCODED if what & 0x40 else LIMITS
    words = data[1:] if what & 0x80 else limits.prefix + data[1:]
    memory = memoryview(bytearray(words.ljust(8, b"\0")))
    region = frame.Region(memory, limits)
    try:
        header = frame.read_header(region, 0, len(memory), limits)
        if header.kind == frame.PARCEL:
            tensors = [one for one in frame.read_parcel(region, 0, header, limits) if one is not None]
        else:
            tensors = list(getattr(frame.read_answer(region, 0, header, limits), "rows", ()))
    except FrameError:
        return
    assert frame.HEADER_BYTES + header.payload_bytes <= len(memory)
    assert header.num_rows <= limits.rows_max
    assert header.num_routes <= limits.routes_max
    assert sum(tensor.nbytes for tensor in tensors) <= len(memory) - frame.HEADER_BYTES


def read_ring(data: bytes) -> None:
    """Counters and entries as the peer likes, changed between any two looks at them."""
    memory = _ring_memory(memoryview(bytearray(3 * PAGE_BYTES + 2 * PAGE_BYTES)), 0, PAGE_BYTES)
    reader, writer = RingReader(memory), RingWriter(memory)
    held = []
    words = memoryview(data[: len(data) // 9 * 9])
    with contextlib.suppress(RingError):
        for at in range(0, min(len(words), 64 * 9), 9):
            what, value = words[at] % 6, int.from_bytes(words[at + 1 : at + 9], "little")
            if what == 0:
                memory.head[0] = value
            elif what == 1:
                memory.tail[0] = value
            elif what == 2:
                memory.entries[value % ENTRIES] = value
            elif what == 3 and (found := reader.next()) is not None:
                offset, nbytes = found
                assert 0 <= offset <= offset + nbytes <= PAGE_BYTES
                held.append(reader.take(nbytes))
            elif what == 4 and held:
                reader.free(held.pop(value % len(held)))
            elif what == 5 and (claimed := writer.claim(1 + value % PAGE_BYTES)) is not None:
                assert 0 <= claimed < PAGE_BYTES
                writer.publish()
            assert reader.held_frames <= ENTRIES
            assert len(writer._frames) <= ENTRIES


def _messages(data: bytes) -> Iterator[bytes]:
    """Cut in pieces: a byte of sixteens, then so many."""
    at = 0
    while at < len(data):
        size = 16 * data[at]
        yield data[at + 1 : at + 1 + size]
        at += 1 + size


def read_stream(data: bytes) -> None:
    """Messages of a gRPC stream: read by its thread, taken by the link."""
    stream = FrameStream(CONFIG, _wiring().parcels_bell)
    link = GrpcExpertLink(THEIRS.member, OWN, CONFIG, stream)
    for message in _messages(data):
        stream.arrive(message)
    stream.read(iter((b"",)))
    frames, nbytes = stream.held
    assert frames <= FRAMES_MAX
    assert nbytes <= occupied_bytes_max(CONFIG)
    _take_all(link.poll)


def read_parcels(data: bytes) -> None:
    """What lies in the ring of an expert worker."""
    _take_all(ShmExpertLink(THEIRS.member, OWN, CONFIG, _filled(data, ring=0)).poll)


def read_answers(data: bytes) -> None:
    """What lies in the ring of an attention worker that waits for two answers."""
    wiring = _filled(data, ring=1)
    link = ShmAttentionLink(Peer(OWN.member, ""), THEIRS, CONFIG, wiring)
    for index in range(2):
        assert link.send(_parcel(2, 0, 1), index) is None
    assert _take_all(link.poll) <= 2


def _take_all(poll: Callable[[], object]) -> int:
    taken = 0
    with contextlib.suppress(TransportError):
        while poll() is not None:
            taken += 1
            assert taken <= CONFIG.parcels_in_flight_max
    return taken


def _filled(data: bytes, ring: int) -> Wiring:
    """Messages lie one after the other, each with its entry; the first byte may make the entries lie."""
    view = memoryview(bytearray(5 * PAGE_BYTES))
    segment = Segment(
        _ring_memory(view, 0, PAGE_BYTES), _ring_memory(view, 1, PAGE_BYTES), view[256:264].cast("Q")
    )
    memory, offset, count = (segment.parcels, segment.replies)[ring], 0, 0
    lie = data[0] if data[:1] >= b"\xf0" else 0
    for message in _messages(data[1:]):
        lines = -(-len(message) // _LINE)
        if offset + lines * _LINE > PAGE_BYTES or count == ENTRIES:
            break
        memory.frames[offset : offset + len(message)] = message
        memory.entries[count] = (offset // _LINE + lie) << 32 | lines
        offset, count = offset + lines * _LINE, count + 1
    memory.head[0] = count
    ours = _wiring()
    return Wiring(ours.sock, ours.parcels_bell, ours.replies_bell, segment)


_open: list[Wiring] = []
_ends: list[socket.socket] = []


def _wiring() -> Wiring:
    """One for all cases: nothing comes over it."""
    if not _open:
        empty = memoryview(mmap.mmap(-1, PAGE_BYTES))
        nothing = _ring_memory(memoryview(bytearray(5 * PAGE_BYTES)), 0, PAGE_BYTES)
        _ends.extend(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        _open.append(Wiring(_ends[0], new_bell(), new_bell(), Segment(nothing, nothing, empty[:8].cast("Q"))))
    bells = _open[0].parcels_bell, _open[0].replies_bell
    for bell in bells:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(bell)
    return _open[0]


def read_greetings(data: bytes) -> None:
    """Hello and welcome, and what is judged of them."""
    with contextlib.suppress(LinkRefused):
        greeting = hello_from_bytes(data)
        assert len(data) <= HELLO_BYTES_MAX
        refused = why_refused(OWN, greeting, (), CONFIG)
        assert len(welcome_to_bytes(Welcome(OWN.member, refused))) <= HELLO_BYTES_MAX
        assert refused or greeting.fingerprint == OWN.fingerprint
        assert greeting.token == OWN.token or refused == "token: not this cluster's"
        assert hello_from_bytes(hello_to_bytes(greeting)) == greeting
    with contextlib.suppress(LinkRefused):
        refuse_unless_welcome(welcome_from_bytes(data), OWN.member)


def shake_hands(data: bytes) -> None:
    """The first byte says which descriptors come with the hello; whatever they are, none stays."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    pick = data[0] if data else 0
    picked = [pick >> shift & 3 for shift in (0, 2, 4)][: 3 - (pick >> 6) % 2]
    with ours, theirs:
        socket.send_fds(theirs, [data[1:] or b"\0"], [_descriptors()[one] for one in picked])
        try:
            link = answer(ours, OWN, (), CONFIG)
        except LinkRefused:
            return
        link.close()
        assert picked == [0, 1, 1], "let in with anything but a segment and two bells"


_prepared: list[int] = []


def _descriptors() -> list[int]:
    """A segment, a bell, a file, a segment of another size."""
    if not _prepared:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
        _prepared.extend((create_segment(PAGE_BYTES), new_bell(), file, create_segment(2 * PAGE_BYTES)))
    return _prepared


def _packed(*messages: bytes) -> bytes:
    padded = [message + bytes(-len(message) % 16) for message in messages]
    return b"".join(bytes([len(message) // 16]) + message for message in padded)


_HELLO = hello_to_bytes(hello(THEIRS, OWN.member, PAGE_BYTES))
_WELCOME = welcome_to_bytes(Welcome(OWN.member, ""))
_OPERATIONS = b"".join(bytes([what]) + value.to_bytes(8, "little") for what, value in (
    (5, 100), (3, 0), (4, 0), (5, 900), (2, 1 << 32 | 2), (0, 3), (3, 0), (1, 2), (5, 8),
))  # fmt: skip

TARGETS = {
    "frame": Target(read_frame, FRAMES, 64 << 10),
    "ring": Target(read_ring, (_OPERATIONS,), 256 << 10),
    "stream": Target(read_stream, (_packed(*PARCELS), _packed(PARCELS[0])), 64 << 10),
    "parcels": Target(read_parcels, (b"\0" + _packed(*PARCELS), b"\xf0" + _packed(PARCELS[0])), 128 << 10),
    "answers": Target(read_answers, (b"\0" + _packed(*ANSWERS), b"\xf0" + _packed(ANSWERS[0])), 128 << 10),
    "greetings": Target(read_greetings, (_HELLO, _WELCOME), 64 << 10),
    "handshake": Target(shake_hands, (b"\x14" + _HELLO, b"\x16" + _HELLO, b"\x17" + _HELLO), 64 << 10),
    **{name: Target(read, seeds, 4 << 20) for name, (read, seeds) in READERS.items()},
}

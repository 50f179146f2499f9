"""Peers that break the rules, by hand: raw frames in rings and streams, on either end of a link."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import torch

from router.placement import EpochId, Member
from router.transport import frame, grpc_channel, shm_handshake
from router.transport.base import UNTIMED, LinkIdentity, Parcel, Peer
from router.transport.grpc_channel import HELLO_KEY, METHOD
from router.transport.handshake import Welcome, hello
from router.transport.shm_bell import ring
from router.transport.shm_handshake import ShmDialer
from router.transport.shm_ring import RingWriter
from router.transport.watch import Watch
from router.transport.wire import hello_to_bytes, welcome_to_bytes
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, identity, parcel

Words = Callable[[bytes], list[bytes]]  # an honest frame -> what is said instead

_PREFIX_FIELDS = ("magic", "version", "dtype", "hidden", "fingerprint")


def with_field(name: str, value: object) -> Words:
    """The frame with one field of its header changed."""

    def change(honest: bytes) -> list[bytes]:
        header = frame.Header._make(frame._HEADER.unpack_from(honest))
        if name in _PREFIX_FIELDS:
            parts = dict(zip(_PREFIX_FIELDS, frame._PREFIX.unpack(header.prefix), strict=True))
            changed = header._replace(prefix=frame._PREFIX.pack(*(parts | {name: value}).values()))
        else:
            changed = header._replace(**{name: value})  # type: ignore[arg-type]
        return [frame._HEADER.pack(*changed) + honest[frame.HEADER_BYTES :]]

    return change


HEADERS: list[tuple[str, Words, str]] = [  # name, words, what the reason says
    ("magic", with_field("magic", b"HTTP"), "begins with b'HTTP'"),
    ("version", with_field("version", 2), "version 2"),
    ("dtype", with_field("dtype", 7), "dtype 7"),
    ("hidden", with_field("hidden", 2**31), "hidden 2147483648"),
    ("fingerprint", with_field("fingerprint", b"another!"), "fingerprint b'another!'"),
    ("kind", with_field("kind", 99), "no such kind: 99"),
    ("negative count", with_field("num_rows", 2**32 - 1), "at most 64"),
    ("huge count", with_field("num_routes", 2**31), "at most 64, 256"),
    ("huge payload", with_field("payload_bytes", 2**63), "do not agree"),
    ("wrong life", with_field("sender", 99), "from incarnation 99"),
    ("other life", with_field("to", 99), "to 99"),
    ("truncated frame", lambda honest: [honest[: max(frame.HEADER_BYTES, len(honest) - 64)]], "bytes follow"),
    ("truncated header", lambda honest: [honest[:64]], "a header alone has"),
    ("noise", lambda _: [b"garbage!" * 16], "begins with"),
]
"""What may be wrong in either direction."""


def honest_parcel(me: LinkIdentity, to: Member) -> bytes:
    """Wide, so that it still has a payload when cut."""
    return frame.parcel_message(parcel(me, to, rows=8), 0, frame.limits_of(me, CONFIG))


def honest_reply(me: LinkIdentity, asked: bytes) -> bytes:
    """To a parcel as it arrived, whatever its rows."""
    limits = frame.limits_of(me, CONFIG)
    header = frame.read_header(frame.Region(memoryview(bytearray(asked)), limits), 0, len(asked), limits)
    sender, own = Member("", header.sender), Member("", header.to)
    routes = torch.zeros(header.num_routes, dtype=torch.int32)
    rows = torch.zeros(header.num_routes, me.hidden, dtype=me.dtype)
    answered = Parcel(sender, own, EpochId(7, 2), header.ticket, header.layer, rows, routes, routes)
    return frame.reply_message(answered, header.parcel_index, rows, UNTIMED, limits)


def rude_attention(kind: str, peer: Peer, name: str, words: list[bytes]) -> None:
    """Be let in, say `words`, and return once thrown out."""
    {"shm": _rude_attention_shm, "grpc": _rude_attention_grpc}[kind](peer, identity(name), words)


def _rude_attention_shm(peer: Peer, me: LinkIdentity, words: list[bytes]) -> None:
    wiring = ShmDialer(me, CONFIG).greet(peer, peer.address).wiring
    wiring.sock.settimeout(PATIENCE_S)
    try:
        shm_handshake._read_welcome(wiring.sock, peer)
        writer = RingWriter(wiring.segment.parcels)
        for said in words:
            write(writer, said)
            ring(wiring.parcels_bell)
        assert wiring.sock.recv(1) == b"", "not thrown out"
    finally:
        wiring.close()


def write(ring_writer: RingWriter, said: bytes) -> None:
    """Its entry says as many lines as there are words."""
    offset = ring_writer.claim(len(said))
    assert offset is not None
    ring_writer._memory.frames[offset : offset + len(said)] = said
    ring_writer.publish()


def _rude_attention_grpc(peer: Peer, me: LinkIdentity, words: list[bytes]) -> None:
    greeting = hello_to_bytes(hello(me, peer.member, CONFIG.link_bytes_max))
    finished = threading.Event()

    def speech() -> Iterator[bytes]:
        yield from words
        finished.wait(PATIENCE_S)  # it is not we who leave

    with grpc_channel.dial(peer.address.removeprefix("grpc:"), replace(CONFIG, link_bytes_max=1 << 22)) as channel:
        answers = channel.stream_stream(METHOD)(speech(), metadata=((HELLO_KEY, greeting),), timeout=PATIENCE_S)
        code = None  # the stream simply ends, or with an error: either way it was not we
        try:
            for _ in answers:
                continue
        except grpc.RpcError as error:
            code = error.code()
        finished.set()
        assert code in (None, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@contextmanager
def rude_expert(kind: str, who: LinkIdentity, words: Words) -> Iterator[Peer]:
    """An expert worker that answers each parcel with `words` instead of an honest reply."""
    with {"shm": _rude_expert_shm, "grpc": _rude_expert_grpc}[kind](who, words) as address:
        yield Peer(who.member, address)


@contextmanager
def _rude_expert_shm(who: LinkIdentity, words: Words) -> Iterator[str]:
    listener, address = shm_handshake.listen(who, CONFIG)
    listener.settimeout(PATIENCE_S)

    def serve() -> None:
        sock, _ = listener.accept()
        sock.settimeout(PATIENCE_S)
        link = shm_handshake.answer(sock, who, (), CONFIG)
        watch = Watch()
        link.join(watch)
        while (found := link._parcels.next()) is None:
            assert watch.wait(PATIENCE_S)
        offset, nbytes = found
        asked = bytes(link._parcels_region.view[offset : offset + nbytes])
        for said in words(honest_reply(who, asked)):
            write(link._replies, said)
        link._ring()
        sock.recv(1)  # until the other side has had enough
        link.close()
        watch.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield address
    finally:
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def _rude_expert_grpc(who: LinkIdentity, words: Words) -> Iterator[str]:
    class Rude(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> object:
            return grpc.stream_stream_rpc_method_handler(converse)

    def converse(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
        yield welcome_to_bytes(Welcome(who.member, ""))
        yield from words(honest_reply(who, next(requests)))
        for _ in requests:
            continue

    with ThreadPoolExecutor(2) as executor:
        server, where = grpc_channel.listen("127.0.0.1", Rude(), executor, CONFIG)
        try:
            yield f"grpc:{where}"
        finally:
            server.stop(None).wait(PATIENCE_S)

"""How an attention end links to an expert over gRPC: the hello in the call's metadata, the welcome first back.

So nobody whose hello was not accepted gets a message read. A link has a channel of its own, hence a connection.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from router.config import RouterConfig
from router.errors import LinkRefused
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, Peer
from router.transport.grpc_channel import HELLO_KEY, METHOD, dial, scheme
from router.transport.grpc_stream import FRAMES_MAX, FrameStream, join_all
from router.transport.handshake import hello, refuse_unless_welcome
from router.transport.lane import Lane, Lanes
from router.transport.lane_greeting import LaneGreeting
from router.transport.link import AttentionLink, Greeting, Incoming, Span
from router.transport.watch import RUNG, Watch
from router.transport.wire import hello_to_bytes, welcome_from_bytes

_TARGET = re.compile(r".+:\d{1,5}")
_JOIN_S = 5.0  # gRPC's threads end within milliseconds of a cancelled call


class GrpcDialer:
    def __init__(self, identity: LinkIdentity, config: RouterConfig, lanes: Lanes | None = None) -> None:
        self._identity, self._config, self._lanes = identity, config, lanes
        self.scheme = scheme(lanes)

    def greet(self, peer: Peer, address: str) -> GrpcGreeting:
        target = address.removeprefix(self.scheme)
        if not _TARGET.fullmatch(target):
            raise LinkRefused(f"address: {address!r}; must be {self.scheme}host:port")
        lane = self._lanes.offer(self._config.link_bytes_max) if self._lanes else None
        call = _Call(target, peer, self._identity, self._config, lane.key if lane else b"")
        return GrpcGreeting(peer, self._identity, self._config, call, lane)

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.close()


class _Call:
    """One stream to one expert, with its connection and threads."""

    def __init__(
        self, target: str, peer: Peer, identity: LinkIdentity, config: RouterConfig, lane_key: bytes
    ) -> None:
        greeting = hello_to_bytes(hello(identity, peer.member, config.link_bytes_max, lane_key))
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stream = FrameStream(config, self.bell, lambda: call.cancel())
        self._threads: list[threading.Thread] = []
        self._has_ended = threading.Event()
        self._channel = dial(target, config)
        speech = _noting_thread(self.stream.speech(), self._threads)
        method = self._channel.stream_stream(METHOD, None, response_deserializer=self.stream.arrive)
        call: Any = method(speech, metadata=((HELLO_KEY, greeting),))
        call.add_done_callback(self._note_end)
        self._reader = threading.Thread(target=self.stream.read, args=(call,), name="exchange-reader")
        self._reader.start()
        self._closed = False

    def _note_end(self, _call: object) -> None:
        self._threads.append(threading.current_thread())
        self._has_ended.set()

    def close(self) -> None:
        """Leaves no thread of ours or gRPC's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.stream.end()
        self._has_ended.wait(_JOIN_S)
        self._channel.close()
        join_all([self._reader, *self._threads], _JOIN_S)
        os.close(self.bell)


def _noting_thread(messages: Iterator[bytes], threads: list[threading.Thread]) -> Iterator[bytes]:
    """Notes who takes the messages: gRPC starts a thread for it, and tells nobody."""
    threads.append(threading.current_thread())
    yield from messages


class GrpcGreeting:
    def __init__(
        self, peer: Peer, identity: LinkIdentity, config: RouterConfig, call: _Call, lane: Lane | None
    ) -> None:
        self._peer, self._identity, self._config = peer, identity, config
        self._call, self._lane = call, lane

    def fileno(self) -> int:
        return self._call.bell

    def welcomed(self) -> AttentionLink | Greeting:
        stream = self._call.stream
        try:
            if not stream.frames:
                raise LinkRefused(stream.gone)
            welcome = welcome_from_bytes(stream.take_welcome())
            refuse_unless_welcome(welcome, self._peer.member)
            if self._lane is None:
                return self._link()
            self._lane.complete(welcome.lane_key)
        except LinkRefused:
            self.close()
            raise
        return LaneGreeting(self._lane, self._link, self.close).welcomed()

    def _link(self) -> GrpcAttentionLink:
        return GrpcAttentionLink(self._peer, self._identity, self._config, self._call, self._lane)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._call.close()


class GrpcAttentionLink(AttentionLink):
    def __init__(
        self, peer: Peer, identity: LinkIdentity, config: RouterConfig, call: _Call, lane: Lane | None = None
    ) -> None:
        super().__init__(peer, identity, config, lane, rows_apart=lane is not None)
        self.kind = lane.kind if lane else "grpc"
        self._call, self._stream = call, call.stream
        if lane is not None:
            self._stream.region = lane.incoming
            self._outgoing = lane.outgoing(memoryview(bytearray(8)), self._limits)
        self._stream.pulse = frame.pulse_message(peer.member, identity.member, self._limits)
        self._leave_watch: Callable[[], None] = lambda: None

    def join(self, watch: Watch) -> None:
        watch.add(self._call.bell, RUNG)
        self._leave_watch = lambda: watch.remove(self._call.bell)
        if self._lane is not None:
            self._lane.join(watch)

    def free(self, span: Span) -> None:
        if not span.freed:
            if self._lane is not None:
                self._lane.done_reading(span.apart_bytes)
            self._stream.let_go(span)

    def close(self) -> None:
        self._leave_watch()
        self._leave_watch = lambda: None
        if self._lane is not None:
            self._lane.close()
        self._call.close()

    def _footprint(self, nbytes: int) -> int:
        return nbytes

    def _has_room_for_reply(self, promised: int) -> bool:
        frames, nbytes = self._stream.held
        nbytes += self._lane.held_bytes if self._lane else 0
        return promised + nbytes <= self._occupied_max and frames + len(self.unanswered) < FRAMES_MAX

    def _put(self, parcel: Parcel, index: int, nbytes: int) -> bool:
        if self._in_flight_bytes + nbytes > self._occupied_max:
            return False
        if self._lane is not None:
            self._outgoing.put_rows(0, parcel.rows, 0)
        self._stream.say(frame.parcel_message(parcel, index, self._limits))
        return True

    def _next(self) -> Incoming | None:
        self.heard_s = self._stream.heard_s
        return self._stream.next(self._limits)

    def _take(self, nbytes: int) -> Span:
        return self._stream.take(nbytes)

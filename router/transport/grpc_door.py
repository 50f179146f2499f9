"""The door between hosts: a gRPC server whose callers are greeted within the waits of their expert end.

A caller whose hello alone tells that it cannot be taken is refused at once, on gRPC's thread; the others are
judged by the end's own thread, which knows who is linked. Until then nothing is read from them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from torch import Tensor

from router.config import RouterConfig
from router.errors import LinkRefused, TransportError
from router.placement import Member
from router.transport import frame
from router.transport.base import LinkIdentity, RefusalReason, Spent
from router.transport.complaints import Complaints
from router.transport.grpc_channel import HELLO_KEY, METHOD, listen, scheme
from router.transport.grpc_stream import REFUSED, FrameStream, join_all
from router.transport.handshake import Hello, Welcome, why_refused
from router.transport.lane import Lane, Lanes
from router.transport.link import Admit, ExpertLink, Incoming, LinkedParcel, Span
from router.transport.watch import READABLE, Watch
from router.transport.wire import hello_from_bytes, welcome_to_bytes

_log = logging.getLogger(__name__)

_JOIN_S = 5.0  # gRPC's threads end within milliseconds of the server
_FLUSH_S = 0.2  # for the last replies of an end that closes


class _Caller:
    """One call: a hello, a stream, and in the end a thread that reads it."""

    def __init__(self, hello: Hello, stream: FrameStream, requests: Iterator[bytes]) -> None:
        self.hello, self.stream = hello, stream
        self.has_ended = threading.Event()
        self.reader = threading.Thread(target=self.stream.read, args=(requests,), name="exchange-reader")


class GrpcDoor(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(
        self, identity: LinkIdentity, config: RouterConfig, host: str, lanes: Lanes | None = None
    ) -> None:
        """Listens at once. Raises TransportError if `host` is none of this machine's addresses."""
        self._identity, self._config, self._lanes = identity, config, lanes
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._callers: deque[_Caller] = deque()  # not yet judged
        self._admitted: list[_Caller] = []
        self._server_threads: set[threading.Thread] = set()
        self._executor = ThreadPoolExecutor(2 * config.peers_max, thread_name_prefix="exchange-door")
        self._closed = False
        try:
            self._server, where = listen(host, self, self._executor, config)
        except TransportError:
            os.close(self._bell)
            raise
        self.address = scheme(lanes) + where
        self._complaints = Complaints(_log, self.address)

    def open(self, watch: Watch, linked: Callable[[], Collection[Member]], admit: Admit) -> None:
        self._linked, self._admit = linked, admit
        watch.add(self._bell, READABLE, self._judge)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        deadline_s = time.monotonic() + _FLUSH_S
        for caller in self._admitted:
            caller.stream.hang_up()
        for caller in self._admitted:
            caller.has_ended.wait(max(0.0, deadline_s - time.monotonic()))
        self._server.stop(None)
        join_all([caller.reader for caller in self._admitted], _JOIN_S)
        self._executor.shutdown()
        join_all(list(self._server_threads), _JOIN_S)
        os.close(self._bell)
        self._complaints.close()

    def let_go(self) -> None:
        if self._lanes is not None:
            self._lanes.close()

    # --- gRPC's threads ----------------------------------------------------------------------

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        self._server_threads.add(threading.current_thread())  # gRPC starts it, and tells nobody
        if handler_call_details.method != METHOD:
            return None
        stream = FrameStream(self._config, self._bell)
        return grpc.stream_stream_rpc_method_handler(partial(self._converse, stream), stream.arrive)

    def _converse(self, stream: FrameStream, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        stream.cancel = context.cancel
        data = next((value for key, value in context.invocation_metadata() if key == HELLO_KEY), b"")
        try:
            caller = self._heard(data, stream, requests)
            if not context.add_callback(stream.hang_up):
                raise LinkRefused("hello: the caller has left")
        except LinkRefused as error:
            self._complaints.note(str(error))
            # In the status: unlike a message, it needs no room at the stranger's, who may never give any.
            context.abort(REFUSED, str(error))
        self._callers.append(caller)
        stream.ring()
        try:
            yield from stream.speech()
        finally:
            caller.has_ended.set()

    def _heard(self, data: bytes, stream: FrameStream, requests: Iterator[bytes]) -> _Caller:
        hello = hello_from_bytes(data)
        refused = why_refused(self._identity, hello, (), self._config)
        if not refused and len(self._callers) >= self._config.peers_max:
            refused = f"peers: {self._config.peers_max} are greeting already"
        if refused:
            raise LinkRefused(refused)
        return _Caller(hello, stream, requests)

    # --- the end's thread --------------------------------------------------------------------

    def _judge(self) -> None:
        os.eventfd_read(self._bell)
        while self._callers:
            caller = self._callers.popleft()
            refused, lane = why_refused(self._identity, caller.hello, self._linked(), self._config), None
            if self._lanes is not None and not refused:
                try:
                    lane = self._lanes.accept(caller.hello.lane_key, caller.hello.ring_bytes)
                except LinkRefused as error:
                    refused = str(error)
            key = lane.key if lane else b""
            caller.stream.say(welcome_to_bytes(Welcome(self._identity.member, refused, key)))
            if refused:
                self._complaints.note(refused)
                caller.stream.hang_up()
                continue
            caller.reader.start()
            self._admitted = [other for other in self._admitted if other.reader.is_alive()]
            self._admitted.append(caller)
            self._admit(GrpcExpertLink(caller.hello.sender, self._identity, self._config, caller.stream, lane))


class GrpcExpertLink(ExpertLink):
    """Has no descriptor of its own: the door's bell rings for all its links."""

    def __init__(
        self, sender: Member, identity: LinkIdentity, config: RouterConfig, stream: FrameStream,
        lane: Lane | None = None,
    ) -> None:  # fmt: skip
        super().__init__(sender, identity, config, lane, rows_apart=lane is not None)
        self._stream = stream
        if lane is not None:
            stream.region = lane.incoming
            self._outgoing = lane.outgoing(memoryview(bytearray(8)), self._limits)
        self._unsent_max = config.parcels_in_flight_max
        self._pulse = frame.pulse_message(identity.member, sender, self._limits)

    @property
    def owes(self) -> bool:
        return self._stream.held[0] > 0

    def pulse(self) -> None:
        if self._stream.unsent < self._unsent_max:
            self._stream.say(self._pulse)

    def join(self, watch: Watch) -> None:
        if self._lane is not None:
            self._lane.join(watch)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._stream.end()

    def _refuse_gone(self) -> None:
        if (ending := self._stream.ending()) is not None:
            raise ending

    def _next(self) -> Incoming | None:
        return self._stream.next(self._limits)

    def _take(self, nbytes: int) -> Span:
        return self._stream.take(nbytes)

    def _reply(self, parcel: LinkedParcel, rows: Tensor, spent: Spent) -> None:
        if self._lane is not None:
            self._outgoing.put_rows(0, rows, 0)
        self._answer(parcel, frame.reply_message(parcel, parcel.index, rows, spent, self._limits))

    def _refuse(self, parcel: LinkedParcel, reason: RefusalReason, detail: bytes) -> None:
        self._answer(parcel, frame.refusal_message(parcel, parcel.index, reason, detail, self._limits))

    def _answer(self, parcel: LinkedParcel, message: bytes) -> None:
        if self._lane is not None:
            self._lane.done_reading(parcel.span.apart_bytes)
        self._stream.let_go(parcel.span)
        self._stream.say(message)

"""The stream that every process keeps to the controller: register, beat, report; and obey what comes back.

It has threads of its own, so that heartbeats depend on no computation and on nobody's event loop. The stream is
begun anew whenever it ends, with growing pauses; each begins with Register, and the controller answers with
what is current, so an order lost with a stream needs no second copy. Orders of an older term, or for another
checkpoint, are refused and counted. It does not know what orders mean.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from expertmesh.v1 import control_pb2, control_pb2_grpc

from cluster import wire
from cluster.auth import auth_metadata
from cluster.events import OrderBody, Register, Report, ReportBody
from router.membership import Adopted, Health, PeerLost, Prepared, Traced, Unprepared
from router.placement import Member

log = logging.getLogger(__name__)

_REPORTS_MAX = 256
_PAUSE_S_MIN = 0.05
_PAUSE_S_MAX = 1.0
_MESSAGE_BYTES_MAX = 64 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # what the environment says of proxies is for the world outside
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the old one's back-off
]


class MemberLink:
    """`register`, `health` and `on_order` are called on the link's threads and must return at once."""

    def __init__(
        self,
        address: str,
        token: str,
        sender: Member,
        fingerprint: str,
        register: Callable[[], Register],
        health: Callable[[], Health],
        on_order: Callable[[OrderBody], None],
        heartbeat_s: float,
    ) -> None:
        self._address, self._token = address, token
        self._sender, self._fingerprint = sender, fingerprint
        self._register, self._health, self._on_order = register, health, on_order
        self._heartbeat_s = heartbeat_s
        self.term = 0  # newest seen
        self.orders_refused = 0
        self.reports_dropped = 0
        self._changed = threading.Condition()  # guards what follows
        self._reports: deque[ReportBody] = deque()  # not yet said
        self._is_beat_due = False
        self._stream = 0  # which stream may speak
        self._call: Any = None
        self._closing = threading.Event()
        self._has_heard = False
        self._thread = threading.Thread(target=self._keep, name="member-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def report(self, body: Prepared | Unprepared | Adopted | PeerLost | Traced | None = None) -> None:
        """Say this, and how we are, without waiting for the next heartbeat. From any thread.

        Kept while there is no stream; with too many waiting the oldest is dropped and counted: the controller
        asks again for what it needs.
        """
        with self._changed:
            if body is not None:
                if len(self._reports) >= _REPORTS_MAX:
                    self._reports.popleft()
                    self.reports_dropped += 1
                self._reports.append(body)
            self._is_beat_due = True
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """End the stream and the threads. Idempotent."""
        self._closing.set()
        self._end_stream()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _keep(self) -> None:
        pause_s = _PAUSE_S_MIN
        while not self._closing.is_set():
            self._has_heard = False
            try:
                self._converse()
            except grpc.RpcError as error:
                log.info("controller at %s: %s %s", self._address, error.code().name, error.details())
            except Exception:
                # The thread's one net: whatever an order did, this process must go on beating, or be killed.
                log.exception("the stream to the controller at %s broke", self._address)
            pause_s = _PAUSE_S_MIN if self._has_heard else min(2 * pause_s, _PAUSE_S_MAX)
            self._closing.wait(pause_s)

    def _converse(self) -> None:
        """One stream, until it ends."""
        with grpc.insecure_channel(self._address, options=_OPTIONS) as channel:
            stub = control_pb2_grpc.ControllerServiceStub(channel)
            with self._changed:
                if self._closing.is_set():
                    return
                speech = self._speak(self._stream)
                self._call = stub.Member(speech, metadata=auth_metadata(self._token))
            try:
                for message in self._call:
                    self._has_heard = True
                    self._obey(message)
            finally:
                self._end_stream()

    def _end_stream(self) -> None:
        with self._changed:
            self._stream += 1
            self._changed.notify_all()
            if self._call is not None:
                self._call.cancel()

    def _speak(self, stream: int) -> Iterator[control_pb2.MemberReport]:
        """On gRPC's thread: what is to be said on this stream."""
        yield self._sealed(self._register())
        while True:
            while (body := self._next_report(stream)) is not None:
                yield self._sealed(body)
            yield self._sealed(self._beat())
            with self._changed:
                self._changed.wait_for(lambda: self._is_beat_due or self._stream != stream, self._heartbeat_s)
                self._is_beat_due = False
                if self._stream != stream:
                    return

    def _beat(self) -> Health:
        """How we are, with what this link refused and dropped."""
        health = self._health()
        own = {
            "controller_orders_refused_total": float(self.orders_refused),
            "controller_reports_dropped_total": float(self.reports_dropped),
        }
        return replace(health, gauges={**health.gauges, **own})

    def _next_report(self, stream: int) -> ReportBody | None:
        with self._changed:
            return self._reports.popleft() if self._reports and self._stream == stream else None

    def _sealed(self, body: ReportBody) -> control_pb2.MemberReport:
        return wire.encode_report(Report(self._sender, self._fingerprint, self.term, body))

    def _obey(self, message: control_pb2.MemberOrder) -> None:
        order = wire.decode_order(message)
        if order.term < self.term or order.fingerprint != self._fingerprint:
            self.orders_refused += 1
            log.warning(
                "order of term %d for checkpoint %s refused; ours: term %d, %s",
                order.term, order.fingerprint, self.term, self._fingerprint,
            )  # fmt: skip
            return
        self.term = order.term
        self._on_order(order.body)


async def fetch_status(address: str, token: str, timeout_s: float) -> dict[str, Any]:
    """The controller's status document. Raises ControllerUnreachable."""
    async with _controller(address) as stub:
        call = stub.Status(control_pb2.StatusRequest(), metadata=auth_metadata(token), timeout=timeout_s)
        return wire.decode_status(await call)


async def fetch_placement(address: str, token: str, timeout_s: float) -> control_pb2.PlacementTable | None:
    """The published placement, None if there is none yet. Raises ControllerUnreachable."""
    async with _controller(address) as stub:
        call = stub.Placement(control_pb2.PlacementRequest(), metadata=auth_metadata(token), timeout=timeout_s)
        reply: control_pb2.PlacementReply = await call
        return reply.table if reply.HasField("table") else None


async def fetch_trace(address: str, token: str, timeout_s: float, seconds: float) -> control_pb2.TraceReply:
    """The attention workers' step traces of the last `seconds`. Raises ControllerUnreachable."""
    async with _controller(address) as stub:
        request = control_pb2.TraceRequest(seconds=seconds)
        reply: control_pb2.TraceReply = await stub.Trace(request, metadata=auth_metadata(token), timeout=timeout_s)
        return reply


async def ask_rebalance(address: str, token: str, timeout_s: float, dry_run: bool) -> dict[str, Any]:
    """What rebalancing does, or would do. Raises ControllerUnreachable."""
    async with _controller(address) as stub:
        request = control_pb2.BalanceRequest(dry_run=dry_run)
        return wire.decode_rebalancing(
            await stub.Balance(request, metadata=auth_metadata(token), timeout=timeout_s)
        )


async def ask_resize(
    address: str, token: str, timeout_s: float, asked: control_pb2.ResizeRequest
) -> control_pb2.ResizeReply:
    """What the controller says to it. Raises ControllerUnreachable: it may have been heard all the same."""
    async with _controller(address) as stub:
        reply: control_pb2.ResizeReply = await stub.Resize(asked, metadata=auth_metadata(token), timeout=timeout_s)
        return reply


@asynccontextmanager
async def _controller(address: str) -> AsyncIterator[Any]:
    try:
        async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
            yield control_pb2_grpc.ControllerServiceStub(channel)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.ABORTED:
            raise ControllerUnreachable(f"not now: {error.details()}") from error
        raise ControllerUnreachable(f"the controller cannot be reached ({error.code().name})") from error


class ControllerUnreachable(Exception):
    """It does not answer, for it may be starting anew, or says that it cannot now."""

"""The gateway's stream to the central scheduler: submit, cancel and finish out, acceptance and closings in.

The stream is begun anew whenever it ends, with growing pauses. After every welcome the scheduler is told all
that is in flight, as resumes of the current attempts: submissions not answered yet too, because an earlier
stream may have carried them and they may already run. So nothing that was lost with a stream or a scheduler
needs to be sent again, except that a lost cancel or finish takes effect when the gateway refuses the sequence's
next token.

Orders of an older term, or for another checkpoint, are refused, counted, and end the stream; the next hello
tells the newest term seen.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TypeAlias

import grpc
from expertmesh.v1 import schedule_pb2, schedule_pb2_grpc

from gateway import wire
from gateway.config import GatewayConfig
from gateway.errors import GatewayError, MalformedMessage, NotReady, OrderRefused, Refusal, TooLarge
from gateway.metrics import GatewayMetrics
from gateway.port import Receiver, Submission

_log = logging.getLogger(__name__)

OrderStream: TypeAlias = "grpc.aio.StreamStreamCall[schedule_pb2.GatewayMessage, schedule_pb2.GatewayOrder]"


class SchedulerLink:
    """Implements SchedulerPort. `address` may be set anew when the scheduler moves: the next stream uses it.
    So may `token_address`, where workers send tokens, once its port is known."""

    def __init__(
        self, address: str, identity: wire.Identity, token: str, config: GatewayConfig, metrics: GatewayMetrics
    ) -> None:
        self.address = address
        self.token_address = identity.token_address
        self._identity = identity
        self._token = token
        self._config = config
        self._metrics = metrics
        self._receiver: Receiver | None = None
        self._pending: dict[str, asyncio.Future[int]] = {}  # submissions not answered yet
        self._outgoing: asyncio.Queue[schedule_pb2.GatewayMessage] | None = None  # None: not welcome now
        self._keeper: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self._term = 0
        self._has_workers = False
        self._model_len_max = 0  # the last that was known
        self._trouble = "the scheduler has not been reached yet"

    # --- SchedulerPort -------------------------------------------------------------------------

    @property
    def not_ready(self) -> str:
        if self._outgoing is None:
            return self._trouble
        return "" if self._has_workers else "no attention worker has joined yet"

    @property
    def model_len_max(self) -> int:
        return self._model_len_max

    async def submit(self, submission: Submission) -> int:
        if self._term == 0:
            raise NotReady(self._trouble, retry_after_s=self._config.retry_after_s)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending[submission.request_id] = answer
        try:
            submit = wire.submit(submission, self._config.submit_bytes_max)
            self._send(schedule_pb2.GatewayMessage(submit=submit))
            async with asyncio.timeout(self._config.submit_timeout_s):
                return await answer
        except TimeoutError:
            raise NotReady(
                f"the scheduler did not answer within {self._config.submit_timeout_s:g} s",
                retry_after_s=self._config.retry_after_s,
            ) from None
        finally:
            del self._pending[submission.request_id]

    def resume(self, submission: Submission) -> None:
        """In parts, each within what the scheduler takes: a request's tokens grow with its answers."""
        try:
            parts = wire.submits(submission, self._config.submit_bytes_max)
        except TooLarge as error:
            assert self._receiver is not None, "what can be resumed was submitted"
            self._receiver.refuse(submission.request_id, error)
            return
        for part in parts:
            self._send(schedule_pb2.GatewayMessage(submit=part))

    def cancel(self, request_id: str) -> None:
        cancel = schedule_pb2.Cancel(request_id=request_id)
        self._send(schedule_pb2.GatewayMessage(cancel=cancel))

    def finish(self, request_id: str, index: int, attempt: int, position: int) -> None:
        finish = wire.finish(request_id, index, attempt, position)
        self._send(schedule_pb2.GatewayMessage(finish=finish))

    # --- life ----------------------------------------------------------------------------------

    def start(self, receiver: Receiver) -> None:
        """Begin to keep a stream. Returns at once; `not_ready` tells how it stands."""
        self._receiver = receiver
        self._keeper = asyncio.create_task(self._keep(), name="scheduler-link")

    async def stop(self) -> None:
        """Idempotent. The scheduler sees the stream end and cancels what this gateway had when its lease does."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None

    async def _keep(self) -> None:
        pause_s = self._config.reconnect_s_min
        while True:
            session = self._session = asyncio.create_task(self._converse())
            try:
                await asyncio.wait({session})
            finally:
                session.cancel()
                await asyncio.wait({session})
                was_welcome, self._outgoing = self._outgoing is not None, None
                self._trouble = _why(session)
            _log.info("scheduler link: %s", self._trouble)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._config.reconnect_s_max)
            if was_welcome:
                pause_s = self._config.reconnect_s_min

    async def _converse(self) -> None:
        """One stream, from hello to its end."""
        outgoing: asyncio.Queue[schedule_pb2.GatewayMessage] = asyncio.Queue(self._config.link_queue_max)
        hello = schedule_pb2.GatewayHello(token_address=self.token_address)
        outgoing.put_nowait(self._sealed(schedule_pb2.GatewayMessage(hello=hello)))
        options = [
            ("grpc.max_receive_message_length", self._config.message_bytes_max),
            ("grpc.max_send_message_length", self._config.message_bytes_max),
            ("grpc.keepalive_time_ms", round(self._config.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self._config.keepalive_timeout_s * 1000)),
            ("grpc.http2.ping_timeout_ms", round(self._config.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.enable_http_proxy", 0),  # what the environment says of proxies is for the world outside
        ]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            stub = schedule_pb2_grpc.SchedulerServiceStub(channel)
            call = stub.Gateway(metadata=wire.bearer(self._token))
            writing = asyncio.create_task(_write(call, outgoing))
            try:
                await self._read(call, outgoing)
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)  # reading has met the same end

    async def _read(self, call: OrderStream, outgoing: asyncio.Queue[schedule_pb2.GatewayMessage]) -> None:
        async with asyncio.timeout(self._config.connect_timeout_s) as limit:
            async for order in call:
                self._check(order)
                if order.HasField("welcome"):
                    limit.reschedule(None)
                    self._welcomed(order.welcome, outgoing)
                else:
                    self._obey(order)

    # --- orders --------------------------------------------------------------------------------

    def _check(self, order: schedule_pb2.GatewayOrder) -> None:
        if order.fingerprint != self._identity.fingerprint:
            self._metrics.orders_refused.labels("fingerprint").inc()
            raise OrderRefused(
                f"the scheduler serves checkpoint {order.fingerprint}, this gateway {self._identity.fingerprint}"
            )
        if order.term < self._term:
            self._metrics.orders_refused.labels("term").inc()
            raise OrderRefused(f"the scheduler has term {order.term}, the newest seen is {self._term}")
        self._term = order.term

    def _welcomed(
        self, welcome: schedule_pb2.Welcome, outgoing: asyncio.Queue[schedule_pb2.GatewayMessage]
    ) -> None:
        """The first of a stream opens it and restores what is in flight; a further one brings news of workers."""
        self._has_workers = welcome.model_len_max > 0
        # A scheduler that has begun anew knows no worker yet: that is no reason to refuse what it will soon take.
        self._model_len_max = welcome.model_len_max or self._model_len_max
        if self._outgoing is outgoing:
            return
        self._outgoing = outgoing
        self._metrics.scheduler_links.inc()
        for submission in self._receiver.claims() if self._receiver is not None else ():
            self.resume(submission)

    def _obey(self, order: schedule_pb2.GatewayOrder) -> None:
        receiver = self._receiver
        assert receiver is not None, "start() gives the receiver before any stream"
        match order.WhichOneof("body"):
            case "accepted":
                self._answer(order.accepted.request_id, order.accepted.queued_before)
            case "rejected":
                error = wire.rejection(order.rejected, self._config)
                if not self._answer(order.rejected.request_id, error):
                    receiver.refuse(order.rejected.request_id, error)
            case "closed":
                at = order.closed.attempt
                receiver.close_attempt(
                    at.request_id, at.index, at.number, wire.close_reason(order.closed), order.closed.detail
                )
            case other:
                raise MalformedMessage(f"the scheduler sent an order with body {other}")

    def _answer(self, request_id: str, answer: int | Refusal) -> bool:
        """Wake the submit that waits for it; False if none does."""
        future = self._pending.get(request_id)
        if future is None:
            return False
        if not future.done():
            if isinstance(answer, Refusal):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        return True

    # --- messages ------------------------------------------------------------------------------

    def _sealed(self, message: schedule_pb2.GatewayMessage) -> schedule_pb2.GatewayMessage:
        message.MergeFrom(wire.envelope(self._identity, self._term))
        return message

    def _send(self, message: schedule_pb2.GatewayMessage) -> None:
        """Queue it for the stream; without one, or when its queue is full, the next welcome makes up for it."""
        if self._outgoing is None:
            return
        try:
            self._outgoing.put_nowait(self._sealed(message))
        except asyncio.QueueFull:
            _log.warning(
                "the scheduler does not read: %d messages wait; the stream is begun anew", self._outgoing.qsize()
            )
            self._outgoing = None
            if self._session is not None:
                self._session.cancel()


async def _write(call: OrderStream, outgoing: asyncio.Queue[schedule_pb2.GatewayMessage]) -> None:
    while True:
        await call.write(await outgoing.get())


def _why(session: asyncio.Task[None]) -> str:
    """Why a stream ended, for `not_ready`. One place, because the link must outlive any reason."""
    error = None if session.cancelled() else session.exception()
    if isinstance(error, grpc.aio.AioRpcError):
        return f"the scheduler cannot be reached ({error.code().name})"
    if isinstance(error, TimeoutError):
        return "the scheduler did not welcome this gateway in time"
    if isinstance(error, GatewayError):
        return str(error)
    if error is not None:
        _log.error("the scheduler link failed", exc_info=error)
    return "the stream to the scheduler ended"

"""An attention worker's gRPC streams: plans and reports with the scheduler, tokens to each gateway.

Runs on one asyncio loop. Streams that break are opened again with growing delays. Tokens that could not be
delivered are not kept: their sequences are reported undelivered, and the gateway resumes what it still wants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from expertmesh.v1 import schedule_pb2_grpc, step_pb2, step_pb2_grpc

from attention_workers import wire
from attention_workers.deliveries import Batch, Deliveries
from attention_workers.step import AttemptId, Completion, Plan
from router.placement import Member

log = logging.getLogger(__name__)

_DELAY_MIN_S, _DELAY_MAX_S = 0.05, 2.0
_MESSAGE_BYTES_MAX = 64 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a ping under way is waited for a minute
    ("grpc.enable_http_proxy", 0),  # what the environment says of proxies is for the world outside
)


class SchedulerLink:
    """One stream to the scheduler, opened again for as long as the worker lives."""

    def __init__(
        self,
        address: str,
        token: str,
        on_plan: Callable[[Plan], None],
        hello: Callable[[], step_pb2.WorkerReport],
        reports_max: int,
    ) -> None:
        """`hello` makes the first report of each stream: capacity and full state."""
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._on_plan = on_plan
        self._hello = hello
        self._reports: asyncio.Queue[step_pb2.WorkerReport] = asyncio.Queue(reports_max)
        self._call: Any = None
        self.is_connected = False
        self.num_dropped = 0

    def report(self, report: step_pb2.WorkerReport) -> None:
        """Queue a report. Beyond the bound the stream is cut, so that the next hello tells the whole state."""
        if not self.is_connected:
            return  # the hello of the next stream tells all
        try:
            self._reports.put_nowait(report)
        except asyncio.QueueFull:
            self.num_dropped += 1
            self.is_connected = False
            if self._call is not None:
                self._call.cancel()

    async def run(self) -> None:
        delay_s = _DELAY_MIN_S
        while True:
            async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
                try:
                    async for plan in self._open(channel):
                        delay_s = _DELAY_MIN_S
                        self._on_plan(wire.plan(plan))
                except grpc.aio.AioRpcError as error:
                    log.warning("scheduler stream ended: %s, %s", error.code().name, error.details())
                except asyncio.CancelledError:
                    if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                        raise  # the worker stops; otherwise only the call was cut
                finally:
                    self.is_connected = False
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _DELAY_MAX_S)

    def _open(self, channel: grpc.aio.Channel) -> AsyncIterator[step_pb2.Plan]:
        while not self._reports.empty():
            self._reports.get_nowait()  # older than the hello
        self.is_connected = True
        self._call = schedule_pb2_grpc.SchedulerServiceStub(channel).Worker(
            self._outgoing(), metadata=self._metadata
        )
        return self._call  # type: ignore[no-any-return]

    async def _outgoing(self) -> AsyncIterator[step_pb2.WorkerReport]:
        yield self._hello()
        while True:
            yield await self._reports.get()


class TokenLink:
    """One stream to one gateway."""

    def __init__(self, address: str, links: TokenLinks) -> None:
        self.address = address
        self._links = links
        self._batches: asyncio.Queue[step_pb2.TokenBatch] = asyncio.Queue(links.backlog_max)
        self._deliveries = Deliveries(links.backlog_max)

    def send(self, batch: Batch) -> bool:
        """False when the gateway has fallen too far behind."""
        if not self._deliveries.send(batch.completions) or self._batches.full():
            return False
        number = self._deliveries.number
        self._batches.put_nowait(wire.batch_pb(self._links.sender, self._links.fingerprint, batch.deltas, number))
        return True

    async def run(self) -> None:
        """Until the stream breaks, in whatever way; then says so once and ends."""
        try:
            async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
                stub = step_pb2_grpc.TokenServiceStub(channel)
                async for ack in stub.Deliver(self._outgoing(), metadata=self._links.metadata):
                    self._acknowledge(ack)
        except grpc.aio.AioRpcError as error:
            log.warning("token stream to gateway %s broke: %s", self.address, error.code().name)
        finally:
            self._links.broken(self)

    def _acknowledge(self, ack: step_pb2.TokenAck) -> None:
        if completions := self._deliveries.acknowledge(ack.number):
            self._links.on_completed(completions)
        if ack.refused:
            self._links.on_refused([wire.attempt(a) for a in ack.refused])

    def undelivered(self) -> list[AttemptId]:
        """Sequences that ended here, but whose last tokens may not have arrived."""
        return self._deliveries.undelivered()

    async def _outgoing(self) -> AsyncIterator[step_pb2.TokenBatch]:
        while True:
            yield await self._batches.get()


class TokenLinks:
    """The streams to all gateways, opened at the first token and dropped when they break."""

    def __init__(
        self,
        sender: Member,
        fingerprint: str,
        token: str,
        backlog_max: int,
        *,
        on_completed: Callable[[list[Completion]], None],
        on_refused: Callable[[list[AttemptId]], None],
        on_broken: Callable[[str, list[AttemptId]], None],
    ) -> None:
        self.sender, self.fingerprint = sender, fingerprint
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.backlog_max = backlog_max
        self.on_completed, self.on_refused, self._on_broken = on_completed, on_refused, on_broken
        self._links: dict[str, tuple[TokenLink, asyncio.Task[None]]] = {}

    def send(self, address: str, batch: Batch) -> None:
        if address not in self._links:
            link = TokenLink(address, self)
            self._links[address] = (link, asyncio.get_running_loop().create_task(link.run()))
        link, task = self._links[address]
        if not link.send(batch):
            task.cancel()
            self.broken(link)

    def broken(self, link: TokenLink) -> None:
        if self._links.get(link.address, (None,))[0] is link:
            del self._links[link.address]
            self._on_broken(link.address, link.undelivered())

    async def close(self) -> None:
        tasks = [task for _, task in self._links.values()]
        self._links.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

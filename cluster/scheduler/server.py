"""The scheduler's link: streams into and out of the pure core.

One task turns: it takes what the inbox holds, one event at a time, has deadlines judged, asks for plans,
and puts each command into its peer's outbox. A peer is not read while too much of what it said waits to be
handled, or of its orders to be taken; one whose outbox is full has its stream closed, and says what it holds
when it joins again. Nothing is decided here, except to stop for good when a peer has seen a newer term: there
is another scheduler then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from expertmesh.v1 import schedule_pb2, schedule_pb2_grpc, step_pb2
from google.protobuf.message import DecodeError

from cluster.auth import TokenInterceptor
from cluster.scheduler import wire
from cluster.scheduler.core import Scheduler
from cluster.scheduler.errors import AddressUnusable, MalformedMessage
from cluster.scheduler.events import (
    Command,
    DropLink,
    Event,
    GatewayJoined,
    GatewayLost,
    Incarnation,
    Tick,
    WorkerJoined,
    WorkerLost,
)

ABORT_S = 1.0  # to have a closed stream's peer take the reason

log = logging.getLogger(__name__)

Message: TypeAlias = schedule_pb2.GatewayMessage | step_pb2.WorkerReport
Order: TypeAlias = schedule_pb2.GatewayOrder | step_pb2.Plan
Requests: TypeAlias = AsyncIterator[Any]
Context: TypeAlias = "grpc.aio.ServicerContext[Message, Order]"
End: TypeAlias = tuple[grpc.StatusCode, str]
Decode: TypeAlias = Callable[[Any, Incarnation], Event]


class Link:
    """One peer's stream: what it said that is not yet handled, and what it has not yet taken."""

    def __init__(self, peer: Incarnation, inbox_max: int, outbox_max: int) -> None:
        self.peer = peer
        self.dropped: asyncio.Future[End] = asyncio.Future()
        self.room = asyncio.Semaphore(inbox_max)
        self._inbox_max = inbox_max
        self._outbox: asyncio.Queue[Order] = asyncio.Queue(outbox_max)
        self._may_read = asyncio.Event()
        self._may_read.set()

    def give(self, order: Order) -> None:
        """Raises asyncio.QueueFull when too many wait already."""
        self._outbox.put_nowait(order)
        if self._outbox.qsize() > self._inbox_max:
            self._may_read.clear()

    async def take(self) -> Order:
        order = await self._outbox.get()
        if self._outbox.qsize() <= self._inbox_max:
            self._may_read.set()
        return order

    async def may_read(self) -> None:
        """Wait for room, and while the peer does not take its orders."""
        await self.room.acquire()
        await self._may_read.wait()

    def drop(self, code: grpc.StatusCode, reason: str) -> None:
        """End the stream. The first reason counts."""
        if not self.dropped.done():
            self.dropped.set_result((code, reason))


class SchedulerServer(schedule_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, scheduler: Scheduler, token: str) -> None:
        self.counters: Counter[str] = Counter()
        self._scheduler = scheduler
        self._config = config = scheduler.config
        self._links: dict[Incarnation, Link] = {}
        self._inbox: deque[tuple[Event, Link | None]] = deque()  # with the stream it came from
        self._wake = asyncio.Event()
        self._ended: asyncio.Future[int] = asyncio.Future()
        self._turning: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=[TokenInterceptor(token)],
            maximum_concurrent_rpcs=config.links_max,
            options=[
                ("grpc.so_reuseport", 0),  # an occupied port is an error
                ("grpc.max_receive_message_length", config.message_bytes_max),
                ("grpc.max_send_message_length", config.plan_bytes_max),
                ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
                ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # peers may ask as often
            ],
        )
        schedule_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)

    async def start(self, address: str) -> str:
        """Serve on `address` (host:port, unix:path, unix-abstract:name); returns it with its port."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressUnusable(f"address {address!r} cannot be bound: {error}") from error
        await self._server.start()
        self._turning = asyncio.create_task(self._turn_forever())
        return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """End every stream and this server. Idempotent."""
        if self._turning is not None:
            self._turning.cancel()
            await asyncio.wait([self._turning])
        self._drop_all(grpc.StatusCode.UNAVAILABLE, "the scheduler stops")
        await self._server.stop(grace=1.0)

    async def wait(self) -> int:
        """Until a peer has seen a newer term, which is returned, or turning failed, which is raised."""
        return await asyncio.shield(self._ended)

    def post(self, event: Event) -> None:
        """Hear an event that comes from no stream, such as the controller's MembersExpected."""
        self._inbox.append((event, None))
        self._wake.set()

    def snapshot(self) -> dict[str, float]:
        """The scheduler's gauges and the links' own counters."""
        own = {f"{name}_total": float(count) for name, count in sorted(self.counters.items())}
        return {**self._scheduler.snapshot(), "inbox": len(self._inbox), **own}

    async def Gateway(self, requests: Requests, context: Context) -> None:
        config = self._config
        await self._serve(
            requests, context, lambda said, peer: wire.decode_gateway(said, peer, config), GatewayLost
        )

    async def Worker(self, requests: Requests, context: Context) -> None:
        await self._serve(requests, context, wire.decode_worker, WorkerLost)

    async def _serve(
        self, requests: Requests, context: Context, decode: Decode, lost: Callable[[Incarnation], Event]
    ) -> None:
        """One stream, from its hello to its end, of which the core is told however it came."""
        end = (grpc.StatusCode.OK, "")
        link: Link | None = None
        try:
            first = await anext(requests, None)
            if first is not None:
                peer = wire.decode_incarnation(first.sender)
                event = _in_place(decode(first, peer), is_first=True)
                link = self._open(peer)
                self._heed_term(first.term)
                await self._hear(link, event)
                end = await self._converse(requests, context, link, decode)
        except (MalformedMessage, DecodeError) as error:
            self.counters["refused_messages"] += 1
            log.warning("stream of %s closed: %s", link.peer if link else "a stranger", error)
            end = (grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            if link is not None and self._links.get(link.peer) is link:
                del self._links[link.peer]
                self.post(lost(link.peer))
        if end[0] is not grpc.StatusCode.OK:
            # A peer that does not read what was written before would hold this up for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    await context.abort(*end)

    async def _converse(self, requests: Requests, context: Context, link: Link, decode: Decode) -> End:
        """Until the peer ends it, or the link is dropped: returns why."""
        # Apart from the first message: were that cancelled while it is written, no status could follow.
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read(requests, link, decode))
        writer = asyncio.create_task(self._write(context, link))
        watched: list[asyncio.Future[Any]] = [reader, writer, link.dropped]
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if link.dropped in done:
                return link.dropped.result()
            for task in done:
                task.result()
            return grpc.StatusCode.OK, ""
        finally:
            reader.cancel()
            writer.cancel()

    def _open(self, peer: Incarnation) -> Link:
        """Ids are unique in the cluster: a second stream of the same life takes the place of the first."""
        link = Link(peer, self._config.link_inbox_max, self._config.link_outbox_max)
        before = self._links.get(peer)
        self._links[peer] = link
        if before is not None:
            before.drop(grpc.StatusCode.ABORTED, f"{peer} has joined again")
        if self._ended.done():
            link.drop(grpc.StatusCode.FAILED_PRECONDITION, "this scheduler has ended")
        return link

    async def _read(self, requests: Requests, link: Link, decode: Decode) -> None:
        async for message in requests:
            sender = wire.decode_incarnation(message.sender)
            if sender != link.peer:
                raise MalformedMessage(f"sender is {sender}, accepted: {link.peer}, who said hello")
            self._heed_term(message.term)
            await self._hear(link, _in_place(decode(message, sender), is_first=False))

    async def _write(self, context: Context, link: Link) -> None:
        while True:
            await context.write(await link.take())

    async def _hear(self, link: Link, event: Event) -> None:
        await link.may_read()
        if self._links.get(link.peer) is link:  # else it has joined again: what this stream said is void
            self._inbox.append((event, link))
            self._wake.set()

    def _heed_term(self, term: int) -> None:
        if term > self._scheduler.term and not self._ended.done():
            log.error("term %d was seen, ours is %d: another scheduler decides", term, self._scheduler.term)
            self._ended.set_result(term)
            self._drop_all(grpc.StatusCode.FAILED_PRECONDITION, f"superseded by term {term}")

    def _drop_all(self, code: grpc.StatusCode, reason: str) -> None:
        for link in self._links.values():
            link.drop(code, reason)

    async def _turn_forever(self) -> None:
        try:
            while not self._ended.done():
                # Not wait_for: in Python 3.11 it can swallow a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._config.tick_s):
                        await self._wake.wait()
                self._wake.clear()
                self._turn(time.monotonic())
        except Exception as error:
            # A decider in doubt decides nothing more: a new term starts from what its peers say.
            log.exception("the scheduler failed")
            self._ended.set_exception(error)
            self._drop_all(grpc.StatusCode.INTERNAL, "the scheduler failed")

    def _turn(self, now_s: float) -> None:
        for _ in range(len(self._inbox)):
            event, link = self._inbox.popleft()
            if link is not None:
                link.room.release()
            self._send(self._scheduler.step(event, now_s))
        self._send(self._scheduler.step(Tick(), now_s))
        self._send(self._scheduler.round(now_s))

    def _send(self, commands: list[Command]) -> None:
        term, fingerprint = self._scheduler.term, self._scheduler.fingerprint
        for command in commands:
            link = self._links.get(command.to)
            if link is None or link.dropped.done():
                self.counters["undeliverable"] += 1  # settled when this peer joins again
            elif isinstance(command, DropLink):
                log.warning("stream of %s closed: %s", command.to, command.reason)
                link.drop(grpc.StatusCode.FAILED_PRECONDITION, command.reason)
            else:
                self._give(link, wire.encode(command, term, fingerprint))

    def _give(self, link: Link, order: Order) -> None:
        try:
            link.give(order)
        except asyncio.QueueFull:
            self.counters["links_closed_full"] += 1
            bound = self._config.link_outbox_max
            link.drop(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{bound} orders not taken (link_outbox_max)")


def _in_place(event: Event, is_first: bool) -> Event:
    if isinstance(event, GatewayJoined | WorkerJoined) != is_first:
        raise MalformedMessage("hello must be the first message, and only the first")
    return event

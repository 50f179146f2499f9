"""The controller's shell: member streams into the pure core, its commands back out. Decides nothing.

One task turns: it takes what the inbox holds, one event at a time, then tells the time; commands go into the
members' outboxes and to the driver that runs workers. Readers wait while the inbox is full; a member whose
outbox is full has its stream closed, and is told what is current when it registers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import grpc
import grpc.aio
from expertmesh.v1 import control_pb2, control_pb2_grpc

from cluster import wire
from cluster.auth import TokenInterceptor
from cluster.controller import Controller
from cluster.events import (
    WORKER_ROLES,
    ActorDied,
    Command,
    Event,
    KillWorker,
    Left,
    Order,
    Rebalance,
    Register,
    Remember,
    Role,
    Send,
    SendTrace,
    StartWorker,
    StopAll,
    Tick,
    WatchWorker,
)
from cluster.overview import overview, rebalancing
from cluster.processes import is_gone
from cluster.traces import SECONDS_MAX, Traces
from router.membership import Traced
from router.placement import Member as MemberId  # the RPC is named Member

log = logging.getLogger(__name__)

_INBOX_MAX = 4096
_OUTBOX_MAX = 256
_MESSAGE_BYTES_MAX = 64 << 20
_STOP_GRACE_S = 1.0
_TRACE_WAIT_S = 10.0
_REMEMBER_S = 5.0
_DYING_LOOKS, _DYING_LOOK_S = 20, 0.005


class WorkerDriver(Protocol):
    """Runs worker processes. Returns at once; what came of it is told to `on_died`, from any thread."""

    def bind(self, on_died: Callable[[ActorDied], None]) -> None:
        """Called once, before anything else."""

    def start(self, command: StartWorker) -> None:
        """Start this life unless its number is taken; `on_died` once it has ended or could not be started."""

    def watch(self, command: WatchWorker) -> None:
        """`on_died` once this life, started by an earlier controller, has ended: at once if it is gone."""

    def remember(self, command: Remember) -> Future[None]:
        """Have the next term know this. Done once it is kept, before any start that is asked for later."""

    def kill(self, command: KillWorker) -> None:
        """Make sure that this life is over."""

    def close(self) -> None:
        """Finish what was asked, and leave no thread. Idempotent."""


class _Stream:
    """One member's stream, open."""

    def __init__(self) -> None:
        self.outbox: asyncio.Queue[control_pb2.MemberOrder] = asyncio.Queue(_OUTBOX_MAX)
        self.closed = asyncio.Event()


class ControllerServer(control_pb2_grpc.ControllerServiceServicer):
    def __init__(
        self,
        controller: Controller,
        driver: WorkerDriver,
        token: str,
        about: Mapping[str, Any],
        tick_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`about`: added to the status document; `tick_s`: longest pause between two looks at the deadlines."""
        self._controller, self._driver, self._about = controller, driver, about
        self._tick_s, self._clock = tick_s, clock
        self._streams: dict[MemberId, _Stream] = {}
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(_INBOX_MAX)
        self._pump: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._balancing = asyncio.Lock()
        self._to_keep: Remember | None = None  # for the next term
        self._keeping: Future[None] | None = None
        self._traces = Traces(self._send_trace, controller.term)
        self._server = grpc.aio.server(
            interceptors=[TokenInterceptor(token)],
            options=[
                ("grpc.so_reuseport", 0),  # an occupied address is an error
                ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
            ],
        )
        control_pb2_grpc.add_ControllerServiceServicer_to_server(self, self._server)

    async def start(self, address: str) -> None:
        """Serve on `address` and begin to decide. Raises OSError when the address cannot be bound."""
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"address {address!r} cannot be bound: {error}") from error
        self._loop = asyncio.get_running_loop()
        self._driver.bind(self._died)
        await self._server.start()
        self._pump = asyncio.create_task(self._turn_forever())

    async def stop(self) -> None:
        """Idempotent."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        for stream in self._streams.values():
            stream.closed.set()
        await self._server.stop(_STOP_GRACE_S)
        self._driver.close()

    async def drain(self) -> None:
        """Tell the controller to end the cluster: gateways first. Its phase says how far it is."""
        await self._inbox.put(StopAll())

    def status(self) -> dict[str, Any]:
        return overview(self._controller, self._about, self._clock())

    # Calls.

    async def Status(
        self, _request: control_pb2.StatusRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.StatusReply:
        return wire.encode_status(self.status())

    async def Placement(
        self, _request: control_pb2.PlacementRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.PlacementReply:
        return wire.encode_placement(self._controller.epochs.published)

    async def Trace(
        self, request: control_pb2.TraceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.TraceReply:
        if not 0 < request.seconds <= SECONDS_MAX:
            accepted = f"seconds: {request.seconds:g}; accepted: above 0, at most {SECONDS_MAX:g}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, accepted)
        workers = [worker.member for worker in self._controller.roster.live(Role.ATTENTION)]
        left_s = context.time_remaining() or 2 * _TRACE_WAIT_S
        try:
            came, silent = await self._traces.ask(workers, request.seconds, min(_TRACE_WAIT_S, left_s / 2))
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "others ask for a trace; accepted: later")
        return control_pb2.TraceReply(traces=[trace for trace in came.values() if trace], silent=silent)

    async def Balance(
        self, request: control_pb2.BalanceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.BalanceReply:
        """Worked out in a thread of its own, accepted between two events if nothing has changed meanwhile."""
        if self._balancing.locked():
            await context.abort(grpc.StatusCode.ABORTED, "others rebalance; accepted: later")
        async with self._balancing:
            task = self._controller.rebalancing()
            if task is None:
                why = "a placement is being prepared, a worker is away, or none is in use; accepted: once one is"
                await context.abort(grpc.StatusCode.ABORTED, why)
            assert task is not None
            proposal = await asyncio.to_thread(task.propose)
            epochs = self._controller.epochs
            if not (request.dry_run or proposal.is_empty):
                self._turn(Rebalance(proposal))
                if epochs.preparing is None or epochs.preparing.workers != proposal.after.workers:
                    await context.abort(grpc.StatusCode.ABORTED, "workers came or went; accepted: again")
            ordered = epochs.preparing.epoch if epochs.preparing and not request.dry_run else None
            return wire.encode_rebalancing(rebalancing(self._controller, proposal, ordered))

    async def Resize(
        self, request: control_pb2.ResizeRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.ResizeReply:
        """Answered once the next term would know of it."""
        asked = wire.decode_resize(request)
        if refused := self._controller.refusal(asked):
            return wire.encode_refused(refused)
        log.info("asked for %s", asked)
        self._turn(asked)
        reply = control_pb2.ResizeReply(json=wire.encode_status(self.status()).json)
        if why := await self._unkept():
            reply.not_kept = f"under way, but not kept for the next controller: {why}"
        return reply

    async def _unkept(self) -> str:
        """Why the next term would not know of the pools; empty: it would. What was not kept is tried again."""
        if self._to_keep is None:
            return ""
        if self._keeping is None or (self._keeping.done() and self._keeping.exception()):
            self._keeping = self._driver.remember(self._to_keep)
        try:
            async with asyncio.timeout(_REMEMBER_S):
                await asyncio.shield(asyncio.wrap_future(self._keeping))
        except TimeoutError:
            return f"its store has not answered for {_REMEMBER_S:g} s"
        except Exception as error:
            # Whatever kind the store's is: who asked must know that it is under way all the same.
            log.exception("the pools were not kept for the next term")
            return str(error) or type(error).__name__
        return ""

    def _send_trace(self, member: MemberId, body: SendTrace) -> None:
        self._send(member, Order(self._controller.term, self._controller.shape.fingerprint, body))

    async def Member(
        self, requests: AsyncIterator[control_pb2.MemberReport], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One stream, from its Register to its end."""
        stream, member, register = _Stream(), None, None
        tasks: list[asyncio.Task[Any]] = []
        try:
            first = await anext(requests, None)
            if first is None:
                return
            report = wire.decode_report(first)
            register = report.body
            if not isinstance(register, Register):
                raise wire.Malformed("report: not a register; accepted: register first on every stream")
            if report.term > self._controller.term:
                # Another controller decides: this one must not be heard, and its members will find the other.
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"superseded by term {report.term}")
            member = report.sender
            self._open(member, stream)
            await self._inbox.put(report)
            tasks = [
                asyncio.create_task(self._read(requests, member)),
                asyncio.create_task(self._write(context, stream)),
                asyncio.create_task(stream.closed.wait()),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except wire.Malformed as error:
            log.warning("stream of %s closed: %s", member, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            for task in tasks:
                task.cancel()
            if member is not None and self._streams.get(member) is stream:
                del self._streams[member]
                await self._inbox.put(Left(member))
                if isinstance(register, Register):
                    await self._look_whether_ended(member, register)

    async def _look_whether_ended(self, member: MemberId, register: Register) -> None:
        """A process that dies closes its sockets a moment before it is gone. Where it ran here that is seen at
        once, and whoever would otherwise wait for Ray to say so need not."""
        if register.role not in WORKER_ROLES or register.node != platform.node():
            return
        for _ in range(_DYING_LOOKS):
            if is_gone(register.pid):
                await self._inbox.put(ActorDied(member, "its process has ended"))
                return
            await asyncio.sleep(_DYING_LOOK_S)

    def _open(self, member: MemberId, stream: _Stream) -> None:
        """A second stream of the same life takes the place of the first."""
        before = self._streams.get(member)
        if before is not None:
            before.closed.set()
        self._streams[member] = stream

    async def _read(self, requests: AsyncIterator[control_pb2.MemberReport], member: MemberId) -> None:
        async for message in requests:
            report = wire.decode_report(message)
            if report.sender != member:
                raise wire.Malformed(f"sender: {report.sender}; accepted: {member}, who registered")
            if isinstance(report.body, Traced):
                self._traces.answered(member, report.body)
            else:
                await self._inbox.put(report)

    async def _write(self, context: grpc.aio.ServicerContext[Any, Any], stream: _Stream) -> None:
        while True:
            await context.write(await stream.outbox.get())

    # Turning.

    def _died(self, event: ActorDied) -> None:
        """From the driver's threads."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._inbox.put(event), self._loop)

    async def _turn_forever(self) -> None:
        next_tick_s = self._clock()
        while True:
            wait_s = max(0.0, next_tick_s - self._clock())
            events: list[Event] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):  # wait_for may swallow the cancellation that ends us
                    events.append(await self._inbox.get())
            while not self._inbox.empty() and len(events) < _INBOX_MAX:
                events.append(self._inbox.get_nowait())
            if self._clock() >= next_tick_s:
                events.append(Tick())
                next_tick_s = self._clock() + self._tick_s
            for event in events:
                self._turn(event)

    def _turn(self, event: Event) -> None:
        try:
            commands = self._controller.step(event, self._clock())
        except Exception:
            # The process's one net: one event that cannot be digested must not stop the judging of all others.
            log.exception("the controller could not take %r", event)
            return
        for command in commands:
            self._act(command)

    def _act(self, command: Command) -> None:
        match command:
            case Send(to, body):
                self._send(to, Order(self._controller.term, self._controller.shape.fingerprint, body))
            case StartWorker():
                self._driver.start(command)
            case WatchWorker():
                self._driver.watch(command)
            case Remember():
                self._to_keep, self._keeping = command, self._driver.remember(command)
            case KillWorker(member, pid, _, reason):
                log.warning("%s#%d (pid %d) is lost: %s", member.id, member.incarnation, pid, reason)
                self._driver.kill(command)

    def _send(self, to: MemberId, order: Order) -> None:
        stream = self._streams.get(to)
        if stream is None:
            return  # gone meanwhile: it is told what is current when it registers again
        try:
            stream.outbox.put_nowait(wire.encode_order(order))
        except asyncio.QueueFull:
            log.warning("stream of %s closed: it has not taken %d orders", to, _OUTBOX_MAX)
            stream.closed.set()

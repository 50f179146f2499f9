"""A gateway's process without Ray: HTTP, gRPC, token service, scheduler link and member link in one loop.

Draining: no new calls, /ready and gRPC's health say so, what runs goes on until its time is up; then everything is
closed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from expertmesh.v1.control_pb2 import PlacementTable, ResizeReply, ResizeRequest, TraceReply

from cluster import address
from cluster.events import Exit, OrderBody, Register, Role
from cluster.loop_thread import LoopThread
from cluster.member_link import (
    ControllerUnreachable,
    MemberLink,
    ask_rebalance,
    ask_resize,
    fetch_placement,
    fetch_status,
    fetch_trace,
)
from cluster.spec import ClusterSpec
from cluster.version import VERSION
from cluster.watch import TurnWatch
from gateway.admin_service import AdminService
from gateway.errors import NotReady, PortInUse
from gateway.grpc_server import GrpcServer
from gateway.http_server import HttpServer
from gateway.ledger import Ledger
from gateway.link import SchedulerLink
from gateway.metrics import GatewayMetrics
from gateway.model_card import read_model_card
from gateway.server import create_app
from gateway.state import GatewayState
from gateway.token_service import TokenService
from gateway.wire import Identity
from router.membership import Health, HealthState
from router.placement import Member

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_START_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0
_DRAIN_LOOK_S = 0.05
_FLUSH_S = 1.0
"""For the last bytes of calls whose sequences have ended; what has not ended by then is cut off."""


class GatewayProcess:
    def __init__(self, spec: ClusterSpec, member: Member, node_ip: str) -> None:
        """`node_ip`: where other hosts reach this one, if the cluster has any."""
        config = spec.config
        self._spec, self._member, self._node_ip = spec, member, node_ip
        self._grpc: GrpcServer | None = None
        self._thread = LoopThread("gateway")
        self._watch = TurnWatch({"loop": config.cluster.loop_stall_s})
        self._stopping: asyncio.Task[None] | None = None
        self._member_link = MemberLink(
            spec.controller_address,
            spec.token,
            member,
            spec.facts.fingerprint,
            lambda: Register(Role.GATEWAY, os.getpid(), platform.node(), "cpu", config.url),
            self._health,
            self._obey,
            config.cluster.heartbeat_s,
        )

    def start(self) -> None:
        """Returns when it serves; calls are refused as not ready until a worker has joined.

        Raises PortInUse or CannotListen. Only a later life waits for its ports: they may be the earlier one's.
        """
        self._thread.call(self._serve(), _START_TIMEOUT_S + self._spec.config.cluster.bind_wait_s)
        self._member_link.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    async def _serve(self) -> None:
        spec, config, facts = self._spec, self._spec.config.gateway, self._spec.facts
        wait_s = spec.config.cluster.bind_wait_s if self._member.incarnation > 1 else 0.0
        self._http = await address.take(self._take_port, PortInUse, wait_s)
        card = read_model_card(
            spec.config.model_path, name=spec.config.model_name, fingerprint=facts.fingerprint,
            vocab_size=facts.vocab_size, context=facts.context,
        )  # fmt: skip
        metrics = GatewayMetrics()
        token_address = spec.token_address(self._member.id, self._member.incarnation, self._node_ip)
        identity = Identity(self._member.id, self._member.incarnation, facts.fingerprint, token_address)
        self._link = SchedulerLink(spec.scheduler_address, identity, spec.token, config, metrics)
        self._ledger = Ledger(self._link, config, metrics)
        self._tokens = TokenService(identity, spec.token, self._ledger, config, metrics)
        self._state = GatewayState(
            config,
            card,
            self._link,
            self._ledger,
            metrics,
            self._status,
            self._trace,
            self._resize,
            self._rebalance,
            VERSION,
        )
        self._link.token_address = await self._tokens.start()
        if spec.config.grpc_port:
            admin = AdminService(self._state, self._placement)
            self._grpc = GrpcServer(spec.config.host, spec.config.grpc_port, self._state, admin)
            await address.take(self._grpc.start, PortInUse, wait_s)
        self._link.start(self._ledger)
        await self._http.start(create_app(self._state), config, stop_timeout_s=_FLUSH_S)

    async def _take_port(self) -> HttpServer:
        return HttpServer(self._spec.config.host, self._spec.config.port)

    async def _status(self) -> dict[str, Any]:
        return await self._ask(fetch_status)

    async def _placement(self) -> PlacementTable | None:
        return await self._ask(fetch_placement)

    async def _trace(self, seconds: float) -> TraceReply:
        return await self._ask(functools.partial(fetch_trace, seconds=seconds))

    async def _resize(self, asked: ResizeRequest) -> ResizeReply:
        return await self._ask(functools.partial(ask_resize, asked=asked))

    async def _rebalance(self, dry_run: bool) -> dict[str, Any]:
        timeout_s = self._spec.config.gateway.rebalance_timeout_s
        return await self._ask(functools.partial(ask_rebalance, dry_run=dry_run), timeout_s)

    async def _ask(
        self, fetch: Callable[[str, str, float], Awaitable[Answer]], timeout_s: float | None = None
    ) -> Answer:
        config, spec = self._spec.config.gateway, self._spec
        try:
            return await fetch(spec.controller_address, spec.token, timeout_s or config.status_timeout_s)
        except ControllerUnreachable as error:
            raise NotReady(str(error), retry_after_s=config.retry_after_s) from error

    def _health(self) -> Health:
        if hung := self._watch.look({"loop": self._thread.turns}, time.monotonic()):
            return Health(HealthState.FAILED, detail=hung)
        state = HealthState.DRAINING if self._state.is_draining else HealthState.READY
        if not self._state.is_draining and self._state.not_ready:
            state = HealthState.STARTING
        return Health(state, detail=self._state.not_ready, gauges={"sequences_open": self._ledger.num_open})

    def _obey(self, order: OrderBody) -> None:
        """Membership is no news to a gateway: its attempts are closed by the scheduler."""
        if isinstance(order, Exit):
            log.info("the gateway drains: %s", order.reason)
            self._thread.loop.call_soon_threadsafe(self._begin_stop)

    def _begin_stop(self) -> None:
        if self._stopping is None:
            self._stopping = self._thread.loop.create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        self._state.is_draining = True
        self._member_link.report()  # its health says it
        if self._grpc is not None:
            await self._grpc.drain()
        loop, patience_s = asyncio.get_running_loop(), self._spec.config.cluster.drain_timeout_s
        deadline_s = loop.time() + patience_s
        while self._ledger.num_open and loop.time() < deadline_s:
            await asyncio.sleep(_DRAIN_LOOK_S)
        if self._ledger.num_open:
            log.warning("%d sequences are cut off after %g s", self._ledger.num_open, patience_s)
        async with asyncio.TaskGroup() as closing:
            closing.create_task(self._http.stop())
            if self._grpc is not None:
                closing.create_task(self._grpc.stop(_FLUSH_S))
        await self._tokens.stop()
        await self._link.stop()
        await asyncio.to_thread(self._member_link.close, _CLOSE_TIMEOUT_S)

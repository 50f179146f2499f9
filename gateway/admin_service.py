"""The admin API over gRPC: what the controller says and is told, typed. Holds nothing; asks it at every call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

from expertmesh.v1 import admin_pb2, admin_pb2_grpc, control_pb2

from gateway import admin_wire
from gateway.errors import NotReady, invalid
from gateway.grpc_errors import Context, begin, write
from gateway.rebalancing import typed
from gateway.scaling import drain_request, resized
from gateway.state import GatewayState
from gateway.traces import SECONDS, checked_seconds

NAME = "expertmesh.v1.AdminService"

PAGE_LAYERS = 16
PAGE_LAYERS_MAX = 64

Placed = Callable[[], Awaitable[control_pb2.PlacementTable | None]]


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, state: GatewayState, placed: Placed) -> None:
        """`placed` brings the published placement, None if there is none yet, or raises a Refusal."""
        self._state = state
        self._placed = placed

    async def GetStatus(
        self, _request: admin_pb2.GetStatusRequest, _context: Context
    ) -> admin_pb2.GetStatusResponse:
        return admin_wire.status(await self._state.asked(self._state.status()))

    async def ListPools(
        self, _request: admin_pb2.ListPoolsRequest, _context: Context
    ) -> admin_pb2.ListPoolsResponse:
        document = await self._state.asked(self._state.status())
        return admin_pb2.ListPoolsResponse(pools=admin_wire.pools_of(document))

    async def GetPlacement(
        self, request: admin_pb2.GetPlacementRequest, _context: Context
    ) -> admin_pb2.GetPlacementResponse:
        if request.page_size > PAGE_LAYERS_MAX:
            raise invalid("page_size", request.page_size, f"at most {PAGE_LAYERS_MAX} layers, or 0")
        table = await self._state.asked(self._placed())
        if table is None:
            raise NotReady("no placement is published yet", retry_after_s=self._state.config.retry_after_s)
        return admin_wire.placement_page(table, request.page_size or PAGE_LAYERS, request.page_token)

    async def Scale(self, request: admin_pb2.ScaleRequest, _context: Context) -> admin_pb2.ScaleResponse:
        asked = control_pb2.ResizeRequest(
            attention=request.attention if request.HasField("attention") else None,
            experts=request.experts if request.HasField("experts") else None,
        )
        return admin_pb2.ScaleResponse(pools=admin_wire.pools_of(await resized(self._state, asked)))

    async def Drain(self, request: admin_pb2.DrainRequest, _context: Context) -> admin_pb2.DrainResponse:
        asked = drain_request({"worker": request.worker})
        return admin_pb2.DrainResponse(pools=admin_wire.pools_of(await resized(self._state, asked)))

    async def GetTrace(self, request: admin_pb2.GetTraceRequest, _context: Context) -> admin_pb2.GetTraceResponse:
        seconds = checked_seconds(request.seconds if request.HasField("seconds") else SECONDS)
        reply = await self._state.asked(self._state.trace(seconds))
        return admin_pb2.GetTraceResponse(traces=reply.traces, silent=reply.silent)

    async def Rebalance(
        self, request: admin_pb2.RebalanceRequest, _context: Context
    ) -> admin_pb2.RebalanceResponse:
        return typed(await self._state.rebalanced(request.dry_run))

    async def WatchEvents(self, _request: admin_pb2.WatchEventsRequest, context: Context) -> None:
        """Until the client ends it, does not read, or its deadline passes."""
        async with aclosing(self._state.watch.events()) as events:
            await begin(context)
            async for change in events:
                await write(context, admin_wire.event(change), self._state.config.client_stall_s_max)

"""The admin API over gRPC: what the controller says and is told, typed. Holds nothing; asks it at every call."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from expertmesh.v1 import admin_pb2, admin_pb2_grpc, control_pb2, identity_pb2

from gateway.errors import NotReady, invalid
from gateway.grpc_errors import Context
from gateway.scaling import drain_request, resized
from gateway.state import GatewayState

NAME = "expertmesh.v1.AdminService"

PAGE_LAYERS = 16
PAGE_LAYERS_MAX = 64

Placed = Callable[[], Awaitable[control_pb2.PlacementTable | None]]

_ROLES = {"attention": identity_pb2.ROLE_ATTENTION, "expert": identity_pb2.ROLE_EXPERT}
# The document's words are the enums' names: `ready` is WORKER_STATE_READY and CLUSTER_PHASE_READY.
STATES: dict[str, Any] = {
    name.removeprefix("WORKER_STATE_").lower(): state for name, state in admin_pb2.WorkerState.items()
}
PHASES: dict[str, Any] = {
    name.removeprefix("CLUSTER_PHASE_").lower(): phase for name, phase in admin_pb2.ClusterPhase.items()
}
_GOING = (admin_pb2.WORKER_STATE_DRAINING, admin_pb2.WORKER_STATE_LEAVING)


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, state: GatewayState, placed: Placed) -> None:
        """`placed` brings the published placement, None if there is none yet, or raises a Refusal."""
        self._state = state
        self._placed = placed

    async def GetStatus(
        self, _request: admin_pb2.GetStatusRequest, _context: Context
    ) -> admin_pb2.GetStatusResponse:
        document = await self._state.asked(self._state.status())
        workers = [_worker(worker) for worker in document["workers"]]
        return admin_pb2.GetStatusResponse(
            model=document["model"],
            fingerprint=document["fingerprint"],
            phase=PHASES.get(document["phase"], admin_pb2.CLUSTER_PHASE_UNSPECIFIED),
            term=document["term"],
            epoch=_epoch(document["epoch"]),
            uptime_s=document["uptime_s"],
            workers=workers,
            pools=_pools(workers),
            scaling_failed=document["scaling_failed"],
        )

    async def ListPools(
        self, _request: admin_pb2.ListPoolsRequest, _context: Context
    ) -> admin_pb2.ListPoolsResponse:
        document = await self._state.asked(self._state.status())
        return admin_pb2.ListPoolsResponse(pools=_pools_of(document))

    async def GetPlacement(
        self, request: admin_pb2.GetPlacementRequest, _context: Context
    ) -> admin_pb2.GetPlacementResponse:
        if request.page_size > PAGE_LAYERS_MAX:
            raise invalid("page_size", request.page_size, f"at most {PAGE_LAYERS_MAX} layers, or 0")
        table = await self._state.asked(self._placed())
        if table is None:
            raise NotReady("no placement is published yet", retry_after_s=self._state.config.retry_after_s)
        return placement_page(table, request.page_size or PAGE_LAYERS, request.page_token)

    async def Scale(self, request: admin_pb2.ScaleRequest, _context: Context) -> admin_pb2.ScaleResponse:
        asked = control_pb2.ResizeRequest(
            attention=request.attention if request.HasField("attention") else None,
            experts=request.experts if request.HasField("experts") else None,
        )
        return admin_pb2.ScaleResponse(pools=_pools_of(await resized(self._state, asked)))

    async def Drain(self, request: admin_pb2.DrainRequest, _context: Context) -> admin_pb2.DrainResponse:
        asked = drain_request({"worker": request.worker})
        return admin_pb2.DrainResponse(pools=_pools_of(await resized(self._state, asked)))


def placement_page(
    table: control_pb2.PlacementTable, page_size: int, page_token: str
) -> admin_pb2.GetPlacementResponse:
    """`page_size` layers from where the token of the page before says. Raises BadRequest."""
    prefix = f"{table.epoch.term}.{table.epoch.number}."
    first = 0
    if page_token:
        if not re.fullmatch(re.escape(prefix) + r"\d{1,9}", page_token):
            raise invalid(
                "page_token", page_token, f"the next_page_token of a page of epoch {prefix[:-1]}, or none"
            )
        first = int(page_token.removeprefix(prefix))
    end = min(first + page_size, table.num_layers)
    return admin_pb2.GetPlacementResponse(
        epoch=table.epoch,
        num_layers=table.num_layers,
        num_experts=table.num_experts,
        workers=[placed.worker for placed in table.workers],
        layers=_layers(table, first, end),
        next_page_token=f"{prefix}{end}" if end < table.num_layers else "",
    )


def _layers(table: control_pb2.PlacementTable, first: int, end: int) -> list[admin_pb2.LayerPlacement]:
    layers = [admin_pb2.LayerPlacement(layer=layer) for layer in range(first, end)]
    for index, placed in enumerate(table.workers):
        held: dict[int, list[int]] = {}
        for slot in placed.experts:
            layer, expert = divmod(slot, table.num_experts)
            held.setdefault(layer, []).append(expert)
        for message in layers:
            if message.layer in held:
                message.holdings.add(worker=index, experts=held[message.layer])
    return layers


def _worker(worker: dict[str, Any]) -> admin_pb2.Worker:
    return admin_pb2.Worker(
        id=worker["id"],
        role=_ROLES.get(worker["role"], identity_pb2.ROLE_UNSPECIFIED),
        pid=worker["pid"] or 0,
        node=worker["node"] or "",
        state=STATES.get(worker["state"], admin_pb2.WORKER_STATE_UNSPECIFIED),
        device=worker["device"] or "",
        incarnation=worker["incarnation"],
        bytes_loaded=worker["bytes_loaded"],
        bytes_total=worker["bytes_total"],
        slots=worker["slots"],
        detail=worker["detail"],
        epoch=_epoch(worker["epoch"]),
        bytes_kept=worker["bytes_kept"],
        kept_as=worker["kept_as"],
    )


def _pools_of(document: dict[str, Any]) -> list[admin_pb2.Pool]:
    return _pools([_worker(worker) for worker in document["workers"]])


def _pools(workers: Iterable[admin_pb2.Worker]) -> list[admin_pb2.Pool]:
    pools = {role: admin_pb2.Pool(role=role) for role in _ROLES.values()}
    for worker in workers:
        if worker.role in pools:
            pool = pools[worker.role]
            is_leaving = worker.state in _GOING
            pool.workers_wanted += not is_leaving
            pool.workers_leaving += is_leaving
            pool.workers_ready += worker.state == admin_pb2.WORKER_STATE_READY
            pool.slots += worker.slots
            pool.bytes_loaded += worker.bytes_loaded
    return list(pools.values())


def _epoch(epoch: dict[str, int] | None) -> identity_pb2.Epoch | None:
    return identity_pb2.Epoch(**epoch) if epoch else None

"""From the controller's words to the messages of AdminService. The document's words are the enums' names: `ready`
is WORKER_STATE_READY and CLUSTER_PHASE_READY."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from expertmesh.v1 import admin_pb2, control_pb2, identity_pb2

from gateway.errors import invalid

_ROLES = {"attention": identity_pb2.ROLE_ATTENTION, "expert": identity_pb2.ROLE_EXPERT}
STATES: dict[str, Any] = {
    name.removeprefix("WORKER_STATE_").lower(): state for name, state in admin_pb2.WorkerState.items()
}
PHASES: dict[str, Any] = {
    name.removeprefix("CLUSTER_PHASE_").lower(): phase for name, phase in admin_pb2.ClusterPhase.items()
}
_GOING = (admin_pb2.WORKER_STATE_DRAINING, admin_pb2.WORKER_STATE_LEAVING)


def status(document: dict[str, Any]) -> admin_pb2.GetStatusResponse:
    workers = [_worker(worker) for worker in document["workers"]]
    return admin_pb2.GetStatusResponse(
        model=document["model"],
        fingerprint=document["fingerprint"],
        phase=_phase(document["phase"]),
        term=document["term"],
        epoch=_epoch(document["epoch"]),
        uptime_s=document["uptime_s"],
        workers=workers,
        pools=_pools(workers),
        scaling_failed=document["scaling_failed"],
    )


def event(change: dict[str, Any]) -> admin_pb2.WatchEventsResponse:
    """Of one of `cluster_events.changes`."""
    response = admin_pb2.WatchEventsResponse
    match change["type"]:
        case "status":
            return response(status=status(change["status"]))
        case "phase":
            return response(phase=_phase(change["phase"]))
        case "epoch":
            return response(epoch=_epoch(change["epoch"]))
        case "worker":
            return response(worker=_worker(change["worker"]))
        case "worker_left":
            return response(worker_left=change["worker"])
        case "pool":
            return response(pool=_pool(change["role"], change["pool"]))
        case "failure":
            told = change["failure"]
            failure = admin_pb2.WorkerFailure(
                number=told["number"], worker=told["id"], incarnation=told["incarnation"], reason=told["reason"]
            )
            return response(failure=failure)
        case "scaling_failed":
            return response(scaling_failed=change["reason"])
        case kind:
            assert kind == "unreachable", kind
            return response(unreachable=change["reason"])


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


def pools_of(document: dict[str, Any]) -> list[admin_pb2.Pool]:
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


def _pool(role: str, pool: dict[str, int]) -> admin_pb2.Pool:
    return admin_pb2.Pool(
        role=_ROLES.get(role, identity_pb2.ROLE_UNSPECIFIED),
        workers_wanted=pool["wanted"],
        workers_ready=pool["ready"],
        workers_leaving=pool["leaving"],
        slots=pool["slots"],
        bytes_loaded=pool["bytes_loaded"],
    )


def _epoch(epoch: dict[str, int] | None) -> identity_pb2.Epoch | None:
    return identity_pb2.Epoch(**epoch) if epoch else None


def _phase(word: str) -> Any:
    return PHASES.get(word, admin_pb2.CLUSTER_PHASE_UNSPECIFIED)

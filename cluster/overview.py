"""The status document: what a person or script may want to know of a cluster, as plain JSON values. Pure.

`expertmesh status --json` prints it as it is; field names are promises (DESIGN section 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.balancer.balancer import Proposal
from cluster.controller import Companion, Controller
from cluster.events import WORKER_ROLES, Role
from cluster.lifecycle import WorkerState
from cluster.roster import Worker
from router.placement import EpochId

DRAINING = "draining"  # of a worker that serves and is to leave


def overview(controller: Controller, about: Mapping[str, Any], now_s: float) -> dict[str, Any]:
    """`about`: what the shell knows and no decision needs (model path, transport, addresses)."""
    epochs, shape = controller.epochs, controller.shape
    published = epochs.published
    companions = sorted(controller.companions.values(), key=lambda companion: companion.member)
    schedulers = [_companion(c, now_s) for c in companions if c.register.role is Role.SCHEDULER]
    return {
        **about,
        "fingerprint": shape.fingerprint,
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "term": controller.term,
        "phase": controller.phase.value,
        "uptime_s": round(now_s - controller.began_s, 1),
        "epoch": {"term": published.epoch.term, "number": published.epoch.number} if published else None,
        "replicas": epochs.replicas,
        "pools": {role.value: _pool(controller, role) for role in WORKER_ROLES},
        "scaling_failed": controller.scaling.failed,
        "balance": _balance(controller),
        "reports_refused": controller.reports_refused,
        "workers": [_worker(controller, worker, now_s) for worker in controller.roster.workers.values()],
        "scheduler": schedulers[-1] if schedulers else None,
        "gateways": [_companion(c, now_s) for c in companions if c.register.role is Role.GATEWAY],
        "failures": [
            {
                "number": failure.number,
                "id": failure.member.id,
                "incarnation": failure.member.incarnation,
                "reason": failure.reason,
                "ago_s": round(now_s - failure.at_s, 1),
            }
            for failure in controller.roster.failures
        ],
    }  # fmt: skip


def _balance(controller: Controller) -> dict[str, Any]:
    """`imbalance`: the busiest expert worker's load over the mean, summed over layers, since the placement last
    changed; null: there was none."""
    book, epochs = controller.balancer.book, controller.epochs
    published = tuple(worker.member.id for worker in epochs.published.workers) if epochs.published else ()
    imbalance = book.imbalance(published)
    return {
        "imbalance": None if imbalance is None else round(imbalance, 4),
        "loads": {worker: round(level, 1) for worker, level in book.levels.items()},
        "preparing": {"term": epochs.preparing.epoch.term, "number": epochs.preparing.epoch.number}
        if epochs.preparing
        else None,
    }


def rebalancing(controller: Controller, proposal: Proposal, ordered: EpochId | None) -> dict[str, Any]:
    """The document of `expertmesh rebalance --json`. `ordered`: the epoch it is being prepared as."""
    slots = sum(len(worker.experts) for worker in proposal.before.workers)
    stored = sum(worker.health.bytes_loaded for worker in controller.roster.live(Role.EXPERT))
    return {
        "epoch": {"term": ordered.term, "number": ordered.number} if ordered else None,
        "imbalance_before": proposal.imbalance_before,
        "imbalance_after": proposal.imbalance_after,
        "moves": [
            {"layer": move.layer, "expert": move.expert, "to": move.to, "from": move.source}
            for move in proposal.moves
        ],
        "bytes": len(proposal.moves) * stored // max(slots, 1),
        "dropped": proposal.dropped,
    }


def _pool(controller: Controller, role: Role) -> dict[str, int]:
    workers = controller.roster.pool(role)
    wanted = [worker for worker in workers if worker.is_wanted]
    ready = [worker for worker in wanted if worker.state is WorkerState.READY]
    return {"wanted": len(wanted), "ready": len(ready), "leaving": len(workers) - len(wanted)}


def _state(worker: Worker) -> str:
    """One that is not wanted any more drains, until it is told to exit and leaves."""
    return DRAINING if worker.is_live and not worker.is_wanted else worker.state.value


def _worker(controller: Controller, worker: Worker, now_s: float) -> dict[str, Any]:
    newest = controller.epochs.newest
    placed = [w for w in newest.workers if w.member == worker.member] if newest else []
    register = worker.register
    detail = worker.health.detail
    next_start_s = max(0.0, worker.since_s - now_s) if worker.state is WorkerState.WAITING else None
    if worker.state is WorkerState.FAILED or (next_start_s is not None and not worker.detail):
        detail = worker.detail
    elif next_start_s is not None:
        detail = f"next start in {next_start_s:.0f} s, after: {worker.detail}"
    elif worker.state is WorkerState.STARTING and worker.detail:
        detail = f"again, after: {worker.detail}"
    return {
        "id": worker.id,
        "role": worker.role.value,
        "pid": register.pid if register else None,
        "node": register.node if register else None,
        "device": register.device if register else None,
        "state": _state(worker),
        "detail": detail,
        "incarnation": worker.incarnation,
        "failures": worker.failures,
        "next_start_s": None if next_start_s is None else round(next_start_s, 1),
        "bytes_loaded": worker.health.bytes_loaded,
        "bytes_total": worker.health.bytes_total,
        "bytes_kept": worker.health.bytes_kept,
        "kept_as": worker.health.kept_as,
        "slots": sum(len(w.experts) for w in placed),
        "epoch": {"term": worker.epoch.term, "number": worker.epoch.number} if worker.epoch else None,
        "silent_s": round(now_s - worker.heard_s, 1) if register else None,
        "gauges": dict(worker.health.gauges),
        "links": dict(worker.health.links),
    }


def _companion(companion: Companion, now_s: float) -> dict[str, Any]:
    return {
        "id": companion.member.id,
        "pid": companion.register.pid,
        "node": companion.register.node,
        "address": companion.register.address,
        "incarnation": companion.member.incarnation,
        "state": companion.health.state.value,
        "silent_s": round(now_s - companion.heard_s, 1),
        "gauges": dict(companion.health.gauges),
    }

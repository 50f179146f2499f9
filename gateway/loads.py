"""How busy the cluster is, in the names by which routers and autoscalers of other engines ask for it.

All from the status document, whose gauges are as old as the last heartbeats.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from gateway.errors import invalid

_SECTIONS = ("core", "queues")
FORMATS = ("json", "prometheus")


def sections_and_format(query: Mapping[str, str]) -> tuple[frozenset[str], str]:
    """What of the loads is wanted, and as what. Raises BadRequest."""
    for name, value in query.items():
        if name not in ("include", "format"):
            raise invalid(name, value, "no such parameter; known: include, format")
    wanted = [name.strip() for name in query.get("include", "all").split(",")]
    for name in wanted:
        if name not in (*_SECTIONS, "all"):
            raise invalid("include", name, f"{', '.join(_SECTIONS)} or all, separated by commas")
    kind = query.get("format", "json")
    if kind not in FORMATS:
        raise invalid("format", kind, " or ".join(FORMATS))
    return frozenset(_SECTIONS if "all" in wanted else wanted), kind


def loads(document: Mapping[str, Any], sections: frozenset[str], version: str) -> dict[str, Any]:
    """One entry for each attention worker that serves: as of SGLang's data-parallel ranks."""
    serving = [worker for worker in document["workers"] if worker["role"] == "attention" and worker["gauges"]]
    ranks = [_rank(rank, worker["id"], worker["gauges"]) for rank, worker in enumerate(serving)]
    scheduler = (document.get("scheduler") or {}).get("gauges", {})
    waiting = int(scheduler.get("waiting", 0))
    running = sum(rank["num_running_reqs"] for rank in ranks)
    answer: dict[str, Any] = {
        "timestamp": datetime.fromtimestamp(time.time(), UTC).isoformat(),
        "version": version,
        "dp_rank_count": len(ranks),
    }
    if "core" in sections:
        answer["loads"] = ranks
        answer["aggregate"] = {
            "total_running_reqs": running,
            "total_waiting_reqs": waiting + sum(rank["num_waiting_reqs"] for rank in ranks),
            "total_reqs": running + waiting + sum(rank["num_waiting_reqs"] for rank in ranks),
            "avg_token_usage": round(sum(rank["token_usage"] for rank in ranks) / max(1, len(ranks)), 4),
        }
    if "queues" in sections:
        answer["queues"] = {"waiting": waiting, "waiting_tokens": int(scheduler.get("waiting_tokens", 0))}
    return answer


def _rank(rank: int, worker: str, gauges: Mapping[str, float]) -> dict[str, Any]:
    running, paused = int(gauges.get("sequences", 0)), int(gauges.get("sequences_paused", 0))
    total, free = gauges.get("kv_blocks_total", 0), gauges.get("kv_blocks_free", 0)
    used = total - free - gauges.get("kv_blocks_cached", 0)
    block = gauges.get("kv_block_tokens", 0)
    return {
        "dp_rank": rank,
        "worker": worker,
        "num_running_reqs": running,
        "num_waiting_reqs": paused,
        "num_total_reqs": running + paused,
        "num_used_tokens": int(used * block),
        "max_total_num_tokens": int(total * block),
        "token_usage": round(used / total, 4) if total else 0.0,
    }


def exposition(answer: Mapping[str, Any]) -> bytes:
    """The same as Prometheus reads it."""
    registry = CollectorRegistry()
    for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens", "token_usage"):
        gauge = Gauge(f"expertmesh_load_{name}", f"{name} of an attention worker.", ["worker"], registry=registry)
        for rank in answer.get("loads", ()):
            gauge.labels(rank["worker"]).set(rank[name])
    for name, value in answer.get("queues", {}).items():
        Gauge(f"expertmesh_load_queue_{name}", f"{name} at the scheduler.", registry=registry).set(value)
    return generate_latest(registry)


def server_info(document: Mapping[str, Any], model_len_max: int, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Who serves what, without paths, addresses and keys."""
    told = (
        "version",
        "model",
        "fingerprint",
        "phase",
        "transport",
        "numerics",
        "num_layers",
        "num_experts",
        "pools",
    )
    return {
        **{name: document[name] for name in told if name in document},
        "max_model_len": model_len_max,
        "limits": {name: value for name, value in limits.items() if name.endswith("_max")},
    }

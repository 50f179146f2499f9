"""What a step trace says in few numbers: shares, percentiles by phase, and who was waited for. Torch-free.

`exposed_wait_share`: of the steps' time, how much the attention worker stood waiting for experts;
`exchange_share`: the part of that in which the last reply was under way rather than queued or computed at its
expert worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_workers.trace_records import NOBODY, Records, Snapshot


def summarise(snapshot: Snapshot) -> dict[str, Any]:
    """Plain JSON values. Without a step: counts of zero, shares and percentiles None."""
    steps, exchanges, replies = snapshot.steps, snapshot.exchanges, snapshot.replies
    took_ns = steps["ended_ns"] - steps["began_ns"]
    waited_ns = exchanges["wait_ns"]
    total_ns = int(took_ns.sum())
    return {
        "worker": snapshot.worker,
        "steps": len(steps),
        "covers_s": round((steps["ended_ns"].max(initial=0) - steps["began_ns"][:1].sum()) / 1e9, 3),
        "has_forgotten": snapshot.has_forgotten,
        "exposed_wait_share": _share(waited_ns.sum(), total_ns),
        "exchange_share": _share((waited_ns - exchanges["experts_ns"]).sum(), total_ns),
        "step_us": {kind: _spread(took_ns[steps["is_prefill"] == is_prefill])
                    for is_prefill, kind in enumerate(("decode", "prefill"))},
        "phases_us": _phases(exchanges, replies, total_ns),
        "stragglers": _stragglers(snapshot),
        "microbatches": list(snapshot.choices),
    }  # fmt: skip


def _phases(exchanges: Records, replies: Records, total_ns: int) -> dict[str, Any]:
    """Of one layer of one microbatch; of experts and exchange, of one reply, which others overlap."""
    flight_ns = replies["heard_ns"] - replies["sent_ns"] - replies["queued_ns"] - replies["computed_ns"]
    of_step = {
        name: {**_spread(exchanges[field]), "share": _share(exchanges[field].sum(), total_ns)}
        for name, field in (
            ("attention", "attend_ns"), ("dispatch", "dispatch_ns"), ("waiting", "wait_ns"), ("merge", "merge_ns"),
        )
    }  # fmt: skip
    return {
        **of_step,
        "queue": _spread(replies["queued_ns"]),
        "experts": _spread(replies["computed_ns"]),
        "exchange": _spread(np.maximum(flight_ns, 0)),
    }


def _stragglers(snapshot: Snapshot) -> dict[str, Any]:
    """By expert worker: of how many exchanges it was the last, and for how long it alone was waited for."""
    exchanges, replies = snapshot.exchanges, snapshot.replies
    answered = exchanges[exchanges["last"] != NOBODY]
    told = {}
    for index, peer in enumerate(snapshot.peers):
        last = answered[answered["last"] == index]
        own = replies[replies["peer"] == index]
        if len(own):
            told[peer] = {
                "replies": len(own),
                "last": len(last),
                "last_share": _share(len(last), len(answered)),
                "alone_us": _spread(last["last_by_ns"]),
                "alone_ms_total": round(float(last["last_by_ns"].sum()) / 1e6, 3),
                "experts_us": _spread(own["computed_ns"]),
            }
    return told


def _spread(spans_ns: NDArray[Any]) -> dict[str, float | None]:
    """In microseconds."""
    if not len(spans_ns):
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(spans_ns, (50, 99)) / 1e3
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}


def _share(part: Any, whole: int) -> float | None:
    return round(float(part) / whole, 4) if whole else None

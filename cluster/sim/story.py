"""Outcomes in words, and for scripts."""

from __future__ import annotations

from typing import Any

from cluster.sim.run import Outcome


def replay(outcome: Outcome, file: str = "") -> str:
    """The command that tells this story again."""
    scenario = f" --scenario {file}" if file else ""
    return f"expertmesh simulate{scenario} --seed {outcome.scenario.seed} --trace"


def summary(outcome: Outcome) -> str:
    """One line. Times are virtual."""
    name = f"seed {outcome.scenario.seed}"
    if outcome.broken:
        return f"{name}: BROKEN {outcome.broken}"
    return (
        f"{name}: {outcome.requests} requests, every token right; {outcome.lost} workers lost, {outcome.restarts} "
        f"restarts, longest gap {outcome.worst_gap_s:.1f} s, at rest {outcome.rest_s:.1f} s after the healing"
    )


def document(outcome: Outcome, file: str = "") -> dict[str, Any]:
    """For scripts."""
    return {
        "seed": outcome.scenario.seed,
        "scenario": outcome.scenario.text,
        "broken": outcome.broken,
        "replay": replay(outcome, file) if outcome.broken else "",
        "requests": outcome.requests,
        "tokens": outcome.tokens,
        "workers_lost": outcome.lost,
        "restarts": outcome.restarts,
        "worst_gap_s": round(outcome.worst_gap_s, 3),
        "rest_s": round(outcome.rest_s, 3),
        "events": outcome.events,
        "took_s": round(outcome.took_s, 3),
    }

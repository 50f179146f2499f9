"""What the naive model of the scheduler knows of each sequence and of each worker."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.scheduler import events as ev

Key = tuple[str, int]


@dataclass
class Sequence:
    """The newest attempt of a sequence that has not ended."""

    attempt: ev.AttemptId
    place: tuple[ev.Incarnation, int] | None  # worker and handle; None: it waits
    tenant: str = ""
    cost: int = 0  # of its tenant, when it starts


@dataclass
class AtWorker:
    """One start that a worker has been given, or was found to run."""

    attempt: ev.AttemptId
    plan: int
    num_tokens: int
    charged: int = 0  # tokens of its answer that its tenant has paid
    tenant: str = ""
    priority: int = 0
    prompt_done: bool = False


@dataclass
class Worker:
    limits: ev.WorkerLimits
    report: ev.WorkerReported
    holds: dict[int, AtWorker]
    sent: int
    lost_s: float | None = None

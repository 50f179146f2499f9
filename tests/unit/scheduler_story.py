"""A scheduler told one thing at a time, for stories: domain verbs in, commands out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.events import (
    AttemptId,
    CloseAttempt,
    CloseReason,
    Command,
    Endings,
    Event,
    FinishReason,
    GatewayJoined,
    Incarnation,
    MembersExpected,
    Plan,
    Running,
    SendPlan,
    Sibling,
    Submitted,
    Tick,
    WorkerJoined,
    WorkerLimits,
    WorkerReported,
)
from tests.unit.scheduler_peers import MODEL, Completion, endings, submission

G = Incarnation("gateway-0", 1)
W0 = Incarnation("attention-0", 1)
W1 = Incarnation("attention-1", 1)
STRANGE = 1  # a handle of nothing that was started
LIMITS = WorkerLimits(block_tokens=16, blocks_total=64, sequences_max=8, model_len_max=512)


class Story:
    """One gateway and some workers have joined, each has answered its first plan, and nothing waits."""

    def __init__(
        self,
        *workers: Incarnation,
        limits: WorkerLimits = LIMITS,
        config: SchedulerConfig | None = None,
        expected: frozenset[Incarnation] | None = None,
        term: int = 1,
    ) -> None:
        self.scheduler = Scheduler(config or SchedulerConfig(), term, MODEL)
        self.limits = limits
        self.now_s = 100.0
        self.plans: dict[Incarnation, Plan] = {}  # the last to each worker
        self.handles: dict[AttemptId, int] = {}  # of what was started
        self.free: dict[Incarnation, int] = {}
        self.free_sliding: dict[Incarnation, int] = {}
        self.tell(MembersExpected(frozenset(workers) if expected is None else expected))
        self.tell(GatewayJoined(G, "unix:g0"))
        for worker in workers:
            self.join(worker)
        self.round()
        for worker in workers:
            self.report(worker, state=())
        self.round()

    def tell(self, event: Event, after_s: float = 0.0) -> list[Command]:
        self.now_s += after_s
        commands = self.scheduler.step(event, self.now_s)
        self.scheduler.check()
        return commands

    def round(self, after_s: float = 0.0) -> list[Command]:
        """Deadlines are judged, plans go out."""
        commands = self.tell(Tick(), after_s) + self.scheduler.round(self.now_s)
        self.scheduler.check()
        plans = {command.to: command.plan for command in commands if isinstance(command, SendPlan)}
        self.plans |= plans
        self.handles |= {start.attempt: start.handle for plan in plans.values() for start in plan.starts}
        return commands

    def join(
        self, worker: Incarnation, state: tuple[Running, ...] = (), fingerprint: str = MODEL, **said: Any
    ) -> list[Command]:
        self.free[worker] = self.limits.blocks_total
        self.free_sliding[worker] = self.limits.sliding_blocks_total
        report = self._report(worker, state=state, **said)
        return self.tell(WorkerJoined(worker, fingerprint, self.limits, report))

    def report(self, worker: Incarnation, **said: Any) -> list[Command]:
        """The worker has applied all plans and says this besides."""
        return self.tell(self._report(worker, **said))

    def _report(self, worker: Incarnation, **said: Any) -> WorkerReported:
        plan = self.plans.get(worker)
        base = WorkerReported(
            worker=worker,
            term=self.scheduler.term if plan else 0,
            plan_number=plan.number if plan else 0,
            refused_orders=0,
            blocks_free=self.free[worker],
            sliding_blocks_free=self.free_sliding[worker],
            num_paused=0,
            tokens=0,
        )
        for name, translate in (("completions", self._endings), ("prompts_done", self._handles)):
            if name in said:
                said["endings" if name == "completions" else name] = translate(said.pop(name))
        if said.get("state"):
            known = self.handles
            said["state"] = tuple(r._replace(handle=known.get(r.attempt, r.handle)) for r in said["state"])
        return replace(base, **said)

    def _endings(self, completions: Iterable[tuple[Any, ...]]) -> Endings:
        return endings(Completion(self.handles.get(c[0], STRANGE), *c[1:]) for c in completions)

    def _handles(self, attempts: Iterable[AttemptId]) -> list[int]:
        return [self.handles[attempt] for attempt in attempts]

    def submit(self, request_id: str, **said: Any) -> list[Command]:
        return self.tell(Submitted(G, submission(request_id, **said)))

    def resume(self, request_id: str, attempt: int, num_accepted: int = 0, **said: Any) -> list[Command]:
        siblings = (Sibling(0, attempt, 7, tuple(range(num_accepted))),)
        return self.submit(request_id, siblings=siblings, resume=True, **said)

    def complete(self, worker: Incarnation, *attempts: AttemptId) -> list[Command]:
        return self.report(worker, completions=[(attempt, FinishReason.STOP) for attempt in attempts])

    def started(self, commands: list[Command]) -> dict[Incarnation, list[str]]:
        """Which requests these plans start where, in order."""
        return {
            c.to: [start.attempt.request_id for start in c.plan.starts]
            for c in commands
            if isinstance(c, SendPlan) and c.plan.starts
        }


def attempt(request_id: str, number: int = 1, index: int = 0) -> AttemptId:
    return AttemptId(request_id, index, number)


def siblings(n: int) -> tuple[Sibling, ...]:
    return tuple(Sibling(index, 1, index, ()) for index in range(n))


def closed(commands: list[Command]) -> list[tuple[str, CloseReason]]:
    return [(str(c.attempt), c.reason) for c in commands if isinstance(c, CloseAttempt)]


def running(request_id: str, number: int = 1) -> Running:
    """Started in an older term; each request has an arrival of its own."""
    arrival = int.from_bytes(request_id.encode()[:4])
    return Running(
        attempt(request_id, number), num_tokens=40, prompt_done=True, arrival=arrival, handle=8 * arrival + number
    )


def two_running() -> Story:
    """a at W0, b at W1."""
    story = Story(W0, W1)
    story.submit("a")
    story.submit("b")
    story.round()
    return story

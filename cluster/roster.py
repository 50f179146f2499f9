"""The workers that should be there, and those that are: started, heard, lost, started again, let go. Pure.

Each worker id has one record and at most one life (incarnation) that counts; whatever an earlier life says is
refused. Loss is final: a lost life is killed before its number is left behind. A worker that is not wanted any
more goes on until it is dismissed, and is forgotten once its process has ended. Placement is not known here.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.events import Command, Exit, KillWorker, Pools, Register, Role, Send, StartWorker, WatchWorker
from cluster.lifecycle import LIVE, Change, WorkerState, after
from router.membership import Health, HealthState
from router.placement import EpochId, Member

FAILURES_REMEMBERED_MAX = 64
NOT_HEARD = Health(HealthState.STARTING)


@dataclass(frozen=True)
class Patience:
    """How long the controller waits, and how often it tries."""

    member_deadline_s: float = 5.0
    """A registered worker silent for so long is lost. Several heartbeats: a busy machine delays some."""

    doubt_s: float = 2.0
    """How long what one attention worker says of an expert worker waits for something that confirms it: two
    heartbeats, in which an expert worker that lives is heard."""

    startup_timeout_s: float = 120.0
    """Longest start of a process until it registers, and longest work on an order without a byte of progress."""

    restarts_max: int = 3
    """Starts in a row that never led to service, after which a worker is given up while the cluster has not
    served, and no longer counted on once it has."""

    settled_s: float = 10.0
    """Service for so long makes the next failure count as the first, so that its restart does not wait."""

    backoff_s_min: float = 0.5
    """Wait before the second restart in a row (the first is at once); doubles with each further one."""

    backoff_s_max: float = 30.0

    leave_timeout_s: float = 15.0
    """A dismissed worker whose process has not ended after so long is killed."""


class Failure(NamedTuple):
    number: int  # counts from 1 in each term, also those no longer remembered
    at_s: float
    member: Member
    reason: str


@dataclass
class Worker:
    """What is known of one worker. `incarnation` 0: never started; `register` None: not registered."""

    role: Role
    id: str
    incarnation: int = 0
    state: WorkerState = WorkerState.WAITING
    register: Register | None = None
    health: Health = NOT_HEARD
    detail: str = ""  # why it is waiting or has failed
    since_s: float = 0.0  # in this state; while it waits, when its next start is due
    heard_s: float = 0.0
    epoch: EpochId | None = None  # last one it prepared (expert) or adopted (attention)
    owes: EpochId | None = None  # the epoch it was ordered to prepare or adopt, until it says so
    progress_s: float = 0.0  # when it was ordered to, or last loaded something
    failures: int = 0  # in a row, without settling in between: they make restarts wait
    failed_starts: int = 0  # in a row, without service in between: too many, and it is given up
    has_served: bool = False  # some life of it has been ready
    is_joining: bool = False  # asked for since the cluster serves, and neither ready nor lost yet
    is_wanted: bool = True  # False: it is to leave once nobody needs it

    @property
    def member(self) -> Member:
        return Member(self.id, self.incarnation)

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def may_be_alive(self) -> bool:
        return self.is_live or self.state in (WorkerState.STARTING, WorkerState.LEAVING)

    def change(self, change: Change, now_s: float) -> None:
        state = after(self.state, change)
        if state is not self.state:
            self.state, self.since_s = state, now_s


@dataclass
class Roster:
    patience: Patience
    workers: dict[str, Worker]
    has_served: bool = False  # the cluster, whole: from then on nobody is given up
    num_failures: int = 0
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=FAILURES_REMEMBERED_MAX))
    incarnations: dict[str, int] = field(default_factory=dict)  # newest life of every id there has been

    @classmethod
    def expecting(
        cls, patience: Patience, pools: Pools, incarnations: Mapping[str, int], now_s: float
    ) -> tuple[Roster, list[Command]]:
        """The workers of both pools, and what to do about those that may be there already.

        `incarnations`: the newest life of each that an earlier controller ordered. Those may be alive, so they
        are watched, and have `startup_timeout_s` to register; the others are started by `start_due`.
        """
        roster = cls(patience, {}, incarnations=dict(incarnations))
        for worker_id in pools.attention + pools.experts:
            roster._add(worker_id, now_s)
        for worker_id in pools.leaving:
            if incarnations.get(worker_id, 0):  # else it has never been started
                roster._add(worker_id, now_s).is_wanted = False
        commands: list[Command] = []
        for worker in roster.workers.values():
            if worker.incarnation:
                worker.change(Change.ORDER, now_s)
                commands.append(WatchWorker(worker.member))
        return roster, commands

    @property
    def pools(self) -> Pools:
        """Which there should be, and which are on their way out."""
        attention, experts = (tuple(w.id for w in self.wanted(role)) for role in (Role.ATTENTION, Role.EXPERT))
        return Pools(attention, experts, tuple(w.id for w in self.workers.values() if not w.is_wanted))

    def _add(self, worker_id: str, now_s: float) -> Worker:
        role = Role(worker_id.rpartition("-")[0])
        worker = Worker(role, worker_id, self.incarnations.get(worker_id, 0), since_s=now_s)
        workers = {**self.workers, worker_id: worker}
        self.workers = {w.id: w for w in sorted(workers.values(), key=lambda w: (w.role, _index(w)))}
        return worker

    def grow(self, role: Role, now_s: float) -> None:
        """One more: an expert worker that has not been dismissed yet stays, else one is started by `start_due`.

        An attention worker is not kept: it may say just now that it is empty.
        """
        for worker in self.pool(role):
            if role is Role.EXPERT and not worker.is_wanted and worker.state is not WorkerState.LEAVING:
                worker.is_wanted = True
                return
        names = (f"{role.value}-{index}" for index in itertools.count())
        worker = self._add(next(name for name in names if name not in self.workers), now_s)
        worker.is_joining = self.has_served

    def shrink(self, role: Role) -> Worker:
        """The one that a smaller pool can best do without: one that does not serve, else the last."""
        return max(self.wanted(role), key=lambda worker: (not worker.is_live, _index(worker)))

    def let_go(self, worker: Worker) -> list[Command]:
        """It is not wanted any more. One that has not come yet is ended at once; the others serve until they are
        dismissed."""
        worker.is_wanted = False
        if worker.is_live:
            return []
        self._forget(worker)
        if worker.state is not WorkerState.STARTING:
            return []
        return [KillWorker(worker.member, 0, "", "it is not wanted any more")]

    def dismiss(self, worker: Worker, now_s: float) -> list[Command]:
        """Nobody needs it: it is told to exit."""
        worker.change(Change.LEAVE, now_s)
        worker.owes = None
        return [Send(worker.member, Exit(f"{worker.id} is not needed any more"))]

    def end(self, worker: Worker, detail: str, now_s: float) -> list[Command]:
        """Its process has ended: as it was told to, or it is lost."""
        if worker.state is not WorkerState.LEAVING:
            return self.lose(worker, detail, now_s)
        self._forget(worker)
        return []

    def _forget(self, worker: Worker) -> None:
        self.incarnations[worker.id] = worker.incarnation
        del self.workers[worker.id]

    def leavers(self, role: Role) -> list[Worker]:
        """Not wanted any more, and not dismissed yet."""
        return [worker for worker in self.live(role) if not worker.is_wanted]

    def wanted(self, role: Role) -> list[Worker]:
        return [worker for worker in self.pool(role) if worker.is_wanted]

    def pool(self, role: Role) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.role is role]

    def live(self, role: Role) -> list[Worker]:
        return [worker for worker in self.pool(role) if worker.is_live]

    def counted_on(self, role: Role) -> list[Worker]:
        """Those that are here, or can be expected soon: not those whose starts fail again and again."""
        tries_max = self.patience.restarts_max
        return [
            worker
            for worker in self.wanted(role)
            if worker.is_live or (worker.state is not WorkerState.FAILED and worker.failed_starts <= tries_max)
        ]

    def serve(self, now_s: float) -> None:
        """The cluster has served: whoever was given up is tried again, as often as it takes."""
        self.has_served = True
        for worker in self.workers.values():
            if worker.state is WorkerState.FAILED:
                worker.change(Change.TRY_AGAIN, now_s)
                worker.since_s = now_s + self._backoff_s(worker.failures)

    def find(self, member: Member) -> Worker | None:
        """The worker whose present, unfinished life this is."""
        worker = self.workers.get(member.id)
        is_present = worker is not None and worker.incarnation == member.incarnation and worker.may_be_alive
        return worker if is_present else None

    def register(self, worker: Worker, register: Register, now_s: float) -> None:
        worker.register, worker.epoch, worker.owes, worker.heard_s = register, register.epoch, None, now_s
        worker.has_served = worker.has_served or register.epoch is not None
        worker.change(Change.REGISTER, now_s)

    def hear(self, worker: Worker, health: Health, now_s: float) -> list[Command]:
        """A heartbeat. Before registering it means nothing."""
        if not worker.is_live:
            return []
        if health.bytes_loaded != worker.health.bytes_loaded:
            worker.progress_s = now_s
        worker.heard_s, worker.health = now_s, health
        if health.state == HealthState.FAILED:
            return self.lose(worker, health.detail or "failed without a reason", now_s, is_its_own_word=True)
        return []

    def owe(self, worker: Worker, epoch: EpochId, now_s: float) -> None:
        """It has been ordered to prepare or adopt this epoch."""
        if worker.epoch == epoch:
            self.settle(worker, epoch, now_s)
        elif worker.owes != epoch:
            worker.owes, worker.progress_s = epoch, now_s

    def settle(self, worker: Worker, epoch: EpochId, now_s: float) -> None:
        """It has prepared or adopted this epoch: it serves."""
        worker.epoch = epoch if worker.epoch is None else max(worker.epoch, epoch)
        worker.owes = None if worker.owes == epoch else worker.owes
        worker.change(Change.READY, now_s)
        worker.has_served, worker.is_joining = True, False

    def lose(self, worker: Worker, reason: str, now_s: float, is_its_own_word: bool = False) -> list[Command]:
        """This life is over: kill it, and start another after a back-off, or give the worker up.

        A worker that itself says why it cannot serve, and never has, would say so again: it is given up. Not so in
        a cluster that has served: what keeps it from serving may pass, and nobody would start it then.
        """
        self.record(worker.member, reason, now_s)
        pid, node = (worker.register.pid, worker.register.node) if worker.register else (0, "")
        kill = KillWorker(worker.member, pid, node, reason)
        if not worker.is_wanted:
            self._forget(worker)
            return [kill]
        worker.is_joining = False
        has_settled = worker.state is WorkerState.READY and now_s - worker.since_s >= self.patience.settled_s
        worker.failures = 1 if has_settled else worker.failures + 1
        worker.failed_starts = 0 if worker.state is WorkerState.READY else worker.failed_starts + 1
        is_hopeless = is_its_own_word and not worker.has_served
        gives_up = not self.has_served and (is_hopeless or worker.failed_starts > self.patience.restarts_max)
        worker.change(Change.GIVE_UP if gives_up else Change.LOST, now_s)
        worker.since_s = now_s + self._backoff_s(worker.failures) if not gives_up else now_s
        worker.detail, worker.register, worker.epoch, worker.owes = reason, None, None, None
        worker.health = NOT_HEARD
        return [kill]

    def record(self, member: Member, reason: str, now_s: float) -> None:
        """For the status document: this life was lost."""
        self.num_failures += 1
        self.failures.append(Failure(self.num_failures, now_s, member, reason))

    def _backoff_s(self, failures: int) -> float:
        patience = self.patience
        return 0.0 if failures < 2 else min(patience.backoff_s_max, patience.backoff_s_min * 2.0 ** (failures - 2))

    def judge(self, now_s: float) -> list[Command]:
        """Lose who has missed a deadline."""
        commands: list[Command] = []
        for worker in list(self.workers.values()):
            if reason := self._overdue(worker, now_s):
                commands += self.lose(worker, reason, now_s)
        return commands

    def start_due(self, now_s: float) -> list[Command]:
        """Start who is missing, once the back-off of each has passed."""
        commands: list[Command] = []
        for worker in self.workers.values():
            if worker.state is WorkerState.WAITING and now_s >= worker.since_s:
                worker.incarnation += 1
                worker.change(Change.ORDER, now_s)
                commands.append(StartWorker(worker.role, worker.member))
        return commands

    def _overdue(self, worker: Worker, now_s: float) -> str:
        patience = self.patience
        if worker.state is WorkerState.STARTING and now_s - worker.since_s > patience.startup_timeout_s:
            return f"did not register within {patience.startup_timeout_s:g} s"
        if worker.is_live and now_s - worker.heard_s > patience.member_deadline_s:
            return f"silent for {now_s - worker.heard_s:.1f} s"
        if worker.state is WorkerState.LEAVING and now_s - worker.since_s > patience.leave_timeout_s:
            return f"did not exit within {patience.leave_timeout_s:g} s"
        if worker.owes and now_s - worker.progress_s > patience.startup_timeout_s:
            return f"no progress for {now_s - worker.progress_s:.0f} s ({worker.health.detail or 'loading'})"
        return ""

    def restart_deadlines(self, now_s: float) -> None:
        """We were not looking for a while: nobody is late yet."""
        for worker in self.workers.values():
            worker.heard_s = worker.progress_s = now_s
            if worker.state in (WorkerState.STARTING, WorkerState.LEAVING):
                worker.since_s = now_s

    def stop(self, now_s: float) -> None:
        for worker in self.workers.values():
            worker.change(Change.STOP, now_s)


def _index(worker: Worker) -> int:
    return int(worker.id.rpartition("-")[2])

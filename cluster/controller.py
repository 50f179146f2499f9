"""Membership, health and placement: events and a time in, commands out. Pure.

The controller orders the workers that should be there, places experts on those that are, has a placement
prepared before it is published and adopted before its elders are retired, replaces who is lost, lets go whom
nobody needs any more, and ends the cluster in order. It decides; the shell (`controller_server`) carries
messages and a driver runs processes.

Invariants: a placement is published only when every worker in it has said that it holds its slots; an epoch is
retired only when no attention worker that may be alive uses it; nothing from an older life is acted upon.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.accusations import Accusations, Verdict
from cluster.balancer.balancer import Balancer, Task
from cluster.balancer.config import BalancerConfig
from cluster.epochs import Epochs, ModelShape
from cluster.events import (
    WORKER_ROLES,
    ActorDied,
    Command,
    Drain,
    Event,
    Exit,
    KillWorker,
    Left,
    Members,
    Pools,
    Prepare,
    Publish,
    Rebalance,
    Register,
    Report,
    Resize,
    Retire,
    Role,
    Send,
    StopAll,
    Tick,
)
from cluster.lifecycle import WorkerState
from cluster.roster import NOT_HEARD, Patience, Roster, Worker
from cluster.scaling import Refused, Scaling
from router.membership import Adopted, Health, HealthState, PeerLost, Prepared, Unprepared
from router.placement import Member, Placement


class Phase(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"  # has served; something that should be there is not
    FAILED = "failed"  # a worker was given up before the cluster ever served
    DRAINING = "draining"  # gateways finish what runs
    STOPPING = "stopping"  # everything else exits
    STOPPED = "stopped"


@dataclass(frozen=True)
class ControllerConfig:
    """What the controller is told at birth."""

    attention_workers: int = 1
    expert_workers: int = 2
    replicas: int = 1
    drain_timeout_s: float = 30.0
    """Longest wait for gateways to finish what runs."""
    stop_timeout_s: float = 10.0
    """Longest wait for workers to exit by themselves."""
    balancer: BalancerConfig = field(default_factory=BalancerConfig)
    companion_deadline_s: float = 30.0
    """A scheduler or gateway silent for so long is killed, and started again by Ray."""
    pid: int = 0
    node: str = ""
    """This controller's own process: told to the scheduler, which watches it."""
    patience: Patience = field(default_factory=Patience)

    pools: Pools | None = None
    """What an earlier term has remembered; None: as many as above."""


@dataclass
class Companion:
    """A scheduler or gateway: the controller knows it but does not start it."""

    member: Member
    register: Register
    heard_s: float
    health: Health = NOT_HEARD


class Controller:
    def __init__(
        self, config: ControllerConfig, term: int, shape: ModelShape, incarnations: Mapping[str, int], now_s: float
    ) -> None:
        """`incarnations`: newest life of each worker ordered by earlier terms; see Roster.expecting."""
        self.config = config
        self.term = term
        self.shape = shape
        self.began_s = now_s
        pools = config.pools or Pools.of_sizes(config.attention_workers, config.expert_workers)
        self.roster, self._first_commands = Roster.expecting(config.patience, pools, incarnations, now_s)
        self.balancer = Balancer(config.balancer, shape.num_layers, shape.num_experts, config.replicas)
        self.epochs = Epochs(term, shape, self.balancer)
        self.scaling = Scaling(self.roster, self.epochs, term)
        self.accusations = Accusations(config.patience.doubt_s, config.patience.member_deadline_s)
        self.companions: dict[str, Companion] = {}
        self.reports_refused = 0
        self.phase = Phase.STARTING
        self._phase_since_s = now_s
        self._present: set[Member] = set()  # registered and its stream not closed since
        self._told: Members | None = None
        self._last_tick_s = now_s

    def step(self, event: Event, now_s: float) -> list[Command]:
        """What follows from this event. Deadlines are judged on Tick only, so that what came before it counts."""
        commands, self._first_commands = self._first_commands, []
        match event:
            case Report():
                commands += self._hear(event, now_s)
            case ActorDied(member, detail):
                commands += self._end(member, detail, now_s)
                self._present.discard(member)
            case Left(member):
                self._leave(member)
            case Resize() | Drain():
                commands += self.scaling.follow(event, now_s) if self.refusal(event) is None else []
            case Rebalance(proposal):
                commands += self._prepare(self.epochs.rebalance(proposal), now_s)
            case StopAll():
                commands += self._drain(now_s)
            case Tick():
                commands += self._tick(now_s)
        commands += self._sentence(self.accusations.confirmed(self._accusable(), self._present), now_s)
        return commands + self._follow(now_s)

    # What is reported.

    def _hear(self, report: Report, now_s: float) -> list[Command]:
        sender, body = report.sender, report.body
        if report.fingerprint != self.shape.fingerprint:
            return self._refuse(sender, f"it has checkpoint {report.fingerprint}, not {self.shape.fingerprint}")
        if isinstance(body, Register) and body.role not in WORKER_ROLES:
            return self._meet(sender, body, now_s)
        companion = self.companions.get(sender.id)
        if companion is not None and companion.member == sender:
            return self._hear_companion(companion, body, now_s) if isinstance(body, Health) else []
        worker = self.roster.find(sender)
        if worker is None:
            return self._refuse(sender, "its incarnation is not wanted (any more)")
        return self._hear_worker(worker, body, now_s)

    def _refuse(self, sender: Member, why: str) -> list[Command]:
        self.reports_refused += 1
        return [Send(sender, Exit(f"{sender.id}#{sender.incarnation}: {why}"))]

    def _meet(self, sender: Member, register: Register, now_s: float) -> list[Command]:
        known = self.companions.get(sender.id)
        if known is not None and known.member.incarnation > sender.incarnation:
            return self._refuse(sender, f"superseded by incarnation {known.member.incarnation}")
        self.companions[sender.id] = Companion(sender, register, now_s)
        self._present.add(sender)
        return [Send(sender, self._members())]

    def _hear_companion(self, companion: Companion, health: Health, now_s: float) -> list[Command]:
        """The scheduler is answered, so that it hears that this controller turns."""
        companion.heard_s, companion.health = now_s, health
        if health.state is HealthState.FAILED:
            return self._end_companion(companion, health.detail, now_s)
        return [Send(companion.member, self._members())] if companion.register.role is Role.SCHEDULER else []

    def _end_companion(self, companion: Companion, reason: str, now_s: float) -> list[Command]:
        """It is killed; Ray starts its next life."""
        del self.companions[companion.member.id]
        self.roster.record(companion.member, reason, now_s)
        return [KillWorker(companion.member, companion.register.pid, companion.register.node, reason)]

    def _members(self) -> Members:
        attention = self.roster.live(Role.ATTENTION) + self._starting(Role.ATTENTION)
        expected = tuple(sorted(worker.member for worker in attention))
        draining = tuple(sorted(worker.member for worker in attention if not worker.is_wanted))
        return Members(expected, self.config.pid, self.config.node, draining)

    def _hear_worker(self, worker: Worker, body: object, now_s: float) -> list[Command]:
        match body:
            case Register():
                # It serves under an earlier term: we have been restarted, the cluster has not.
                if body.epoch is not None and body.epoch.term < self.term:
                    self.roster.serve(now_s)
                self.roster.register(worker, body, now_s)
                self._present.add(worker.member)
                return self._catch_up(worker, now_s)
            case Health():
                self.balancer.hear(worker.member, body.load, now_s)
                return self.roster.hear(worker, body, now_s)
            case Prepared() | Adopted() if worker.is_live:
                self.roster.settle(worker, body.epoch, now_s)
            case Unprepared(epoch, why) if worker.is_live:
                self.scaling.give_up(worker, epoch, why)
            case PeerLost(member) if worker.is_live:
                self.accusations.hear(worker.member, member, now_s)
        return []

    def _catch_up(self, worker: Worker, now_s: float) -> list[Command]:
        """What a worker that has just (re)joined is to do, whatever it was told before."""
        epochs = self.epochs
        if worker.state is WorkerState.LEAVING:
            return [Send(worker.member, Exit(f"{worker.id} is not needed any more"))]
        if worker.role is Role.ATTENTION:
            return self._order(worker, Publish(epochs.published), now_s) if epochs.published else []
        newest = epochs.newest
        if newest is None or all(placed.member != worker.member for placed in newest.workers):
            return []  # not placed yet: the next placement will have it
        return self._order(worker, Prepare(newest), now_s)

    def _order(self, worker: Worker, body: Prepare | Publish, now_s: float) -> list[Command]:
        self.roster.owe(worker, body.placement.epoch, now_s)
        return [Send(worker.member, body)]

    def _end(self, member: Member, detail: str, now_s: float) -> list[Command]:
        worker = self.roster.find(member)
        return [] if worker is None else self.roster.end(worker, detail, now_s)

    def _accusable(self) -> list[Worker]:
        """One that leaves breaks its links itself."""
        return [
            worker
            for worker in self.roster.pool(Role.EXPERT)
            if worker.may_be_alive and worker.state is not WorkerState.LEAVING
        ]

    def _sentence(self, verdicts: list[Verdict], now_s: float) -> list[Command]:
        commands = [c for verdict in verdicts for c in self.roster.lose(verdict.worker, verdict.reason, now_s)]
        self.accusations.forget(self._accusable())
        return commands

    def _leave(self, member: Member) -> None:
        self._present.discard(member)
        companion = self.companions.get(member.id)
        if companion is not None and companion.member == member:
            del self.companions[member.id]

    def refusal(self, asked: Resize | Drain) -> Refused | None:
        """Why this cannot be, to be asked before it is told; None: it can."""
        if self.phase in (Phase.DRAINING, Phase.STOPPING, Phase.STOPPED):
            return Refused("phase", self.phase.value, "a cluster that does not stop")
        return self.scaling.refusal(asked)

    # Time.

    def _tick(self, now_s: float) -> list[Command]:
        gap_s, self._last_tick_s = now_s - self._last_tick_s, now_s
        if gap_s > self.config.patience.member_deadline_s / 2:
            self.roster.restart_deadlines(now_s)
            self.accusations.restart_deadlines(now_s)
            for companion in self.companions.values():
                companion.heard_s = now_s
            return []
        if self.phase in (Phase.STOPPING, Phase.STOPPED):
            return []
        commands = self.roster.judge(now_s)
        observers = [worker for worker in self.roster.live(Role.ATTENTION) if worker.epoch is not None]
        commands += self._sentence(self.accusations.due(self._accusable(), observers, now_s), now_s)
        return commands + self._judge_companions(now_s)

    def _judge_companions(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for companion in list(self.companions.values()):
            silent_s = now_s - companion.heard_s
            if silent_s > self.config.companion_deadline_s:
                commands += self._end_companion(companion, f"silent for {silent_s:.0f} s", now_s)
        return commands

    # The end.

    def _drain(self, now_s: float) -> list[Command]:
        if self.phase in (Phase.DRAINING, Phase.STOPPING, Phase.STOPPED):
            return []
        self._enter(Phase.DRAINING, now_s)
        return [Send(gateway.member, Exit("the cluster is draining")) for gateway in self._with(Role.GATEWAY)]

    def _stop(self, now_s: float) -> list[Command]:
        self._enter(Phase.STOPPING, now_s)
        members = [worker.member for worker in self.roster.workers.values() if worker.is_live]
        members += [companion.member for companion in self.companions.values()]
        self.roster.stop(now_s)
        return [Send(member, Exit("the cluster is stopping")) for member in members]

    # What follows from the state, whatever the event was.

    def _follow(self, now_s: float) -> list[Command]:
        in_phase_s = now_s - self._phase_since_s
        match self.phase:
            case Phase.STOPPED:
                return []
            case Phase.STOPPING:
                if not self._present or in_phase_s > self.config.stop_timeout_s:
                    self._enter(Phase.STOPPED, now_s)
                return []
            case Phase.DRAINING if not self._with(Role.GATEWAY) or in_phase_s > self.config.drain_timeout_s:
                return self._stop(now_s)
        commands = self.scaling.remember() + self.roster.start_due(now_s) + self._place(now_s)
        commands += self.scaling.dismiss(now_s) + self._tell_members()
        if self.phase is not Phase.DRAINING:
            self._enter(self._serving_phase(now_s), now_s)
        return commands

    def _place(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        experts = self.roster.live(Role.EXPERT)
        staying = [worker for worker in experts if worker.is_wanted]
        commands += self._prepare(self.epochs.propose(self._experts_here(), self._all_here(staying)), now_s)
        if published := self.epochs.publish({worker.member: worker.epoch for worker in experts}):
            self.balancer.book.forget({placed.member.id for placed in published.workers})
            for worker in self.roster.live(Role.ATTENTION):
                commands += self._order(worker, Publish(published), now_s)
        attention = [worker for worker in self.roster.pool(Role.ATTENTION) if worker.may_be_alive]
        if stale := self.epochs.retire([worker.epoch for worker in attention]):
            commands += [Send(worker.member, Retire(stale)) for worker in experts]
        return commands

    def rebalancing(self) -> Task | None:
        """What to work out so as to rebalance the placement in use; None: there is none, or another follows, be it
        because a worker is away."""
        epochs, config = self.epochs, self.config.balancer
        staying = [worker for worker in self.roster.live(Role.EXPERT) if worker.is_wanted]
        if epochs.published is None or epochs.preparing is not None or not self._all_here(staying):
            return None
        return self.balancer.task(self.shape.fingerprint, self._experts_here(), epochs.published, config.moves_max)

    def _experts_here(self) -> dict[Member, Register]:
        """Expert workers that may be given experts, which those that are to leave may not, and what they have
        registered."""
        staying = [worker for worker in self.roster.live(Role.EXPERT) if worker.is_wanted]
        return {worker.member: worker.register for worker in staying if worker.register}

    def _prepare(self, placement: Placement | None, now_s: float) -> list[Command]:
        """Unhurried while everything is held by somebody who lives."""
        if placement is None:
            return []
        experts, published = self.roster.live(Role.EXPERT), self.epochs.published
        live = {worker.member for worker in experts}
        gone = {placed.member for placed in published.workers} - live if published else set()
        unhurried = published is not None and published.is_covered_without(gone)
        placed = {worker.member for worker in placement.workers}
        return [
            command
            for worker in experts
            if worker.member in placed
            for command in self._order(worker, Prepare(placement, unhurried), now_s)
        ]

    def _all_here(self, staying: list[Worker]) -> bool:
        """Every expert worker that is wanted. Once we have served, none waits for one that cannot start."""
        counted_on = self.roster.counted_on(Role.EXPERT)
        is_whole = self.roster.has_served or len(counted_on) == len(self.roster.wanted(Role.EXPERT))
        return is_whole and len(staying) == len(counted_on) > 0

    def _tell_members(self) -> list[Command]:
        members = self._members()
        if members == self._told:
            return []
        self._told = members
        return [Send(companion.member, members) for companion in self.companions.values()]

    def _serving_phase(self, now_s: float) -> Phase:
        workers = [worker for worker in self.roster.workers.values() if worker.is_wanted]
        is_whole = (
            all(worker.state is WorkerState.READY or worker.is_joining for worker in workers)
            and self.epochs.published is not None
            and bool(self._with(Role.SCHEDULER) and self._with(Role.GATEWAY))
        )
        if is_whole and not self.roster.has_served:
            self.roster.serve(now_s)
        if self.roster.has_served:
            return Phase.READY if is_whole else Phase.DEGRADED
        if any(worker.state is WorkerState.FAILED for worker in workers):
            return Phase.FAILED
        return Phase.STARTING

    def _enter(self, phase: Phase, now_s: float) -> None:
        if phase is not self.phase:
            self.phase, self._phase_since_s = phase, now_s

    def _with(self, role: Role) -> list[Companion]:
        return [companion for companion in self.companions.values() if companion.register.role is role]

    def _starting(self, role: Role) -> list[Worker]:
        return [worker for worker in self.roster.pool(role) if worker.state is WorkerState.STARTING]

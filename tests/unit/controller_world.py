"""A cluster without processes: drives the real controller under virtual time, with seeded faults.

Processes are records that register, beat, load and adopt after random delays. The world asserts, at every
command, what must never happen.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.controller import Controller, ControllerConfig, Phase
from cluster.epochs import ModelShape
from cluster.events import (
    ActorDied,
    Command,
    Event,
    Exit,
    KillWorker,
    Left,
    Members,
    Pools,
    Prepare,
    Publish,
    Register,
    Remember,
    Report,
    Retire,
    Role,
    Send,
    StartWorker,
    Tick,
    WatchWorker,
)
from cluster.lifecycle import WorkerState
from router.membership import Adopted, Health, HealthState, PeerLost, Prepared, Unprepared
from router.placement import EpochId, Member, Placement

SHAPE = ModelShape("f00d", num_layers=2, num_experts=6)
HEARTBEAT_S = 1.0
TICK_S = 0.5
TWO_BY_THREE = ControllerConfig(attention_workers=2, expert_workers=3, replicas=2)
NO_SPARES = ControllerConfig(attention_workers=1, expert_workers=2, replicas=1)


@dataclass
class Process:
    role: Role
    member: Member
    pid: int
    is_alive: bool = True
    is_registered: bool = False
    is_linked: bool = False  # its stream to the present controller is open, and began with Register
    frozen_until_s: float = 0.0
    busy_until_s: float = 0.0
    heard_s: float = 0.0  # when the last order reaches it
    held: dict[EpochId, frozenset[tuple[int, int]]] = field(default_factory=dict)  # expert: prepared epochs
    epoch: EpochId | None = None  # attention: in use; expert: last prepared
    slots_max: int = 1 << 30  # expert: what its memory holds
    empty_at_s: float = 0.0  # attention: until then it has sequences
    is_draining: bool = False  # attention: so the scheduler says


class World:
    def __init__(self, config: ControllerConfig, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.config = config
        self.now_s = 0.0
        self.processes: dict[Member, Process] = {}
        self.history: list[Command] = []
        self.fails_to_start: dict[str, str] = {}  # worker id -> what its process says before it ends
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pids = itertools.count(100)
        self._paused_until_s = 0.0
        self.term = 0
        self.version = 0
        self.pools: Pools | None = None  # as the last command to remember them said
        self.placements: dict[EpochId, Placement] = {}  # published
        self.restart_controller()
        for role, name in ((Role.SCHEDULER, "scheduler"), (Role.GATEWAY, "gateway-0")):
            self._spawn(role, Member(name, 1))
        self._at(TICK_S, self._tick)

    # Driving.

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._heap and self._heap[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self._heap)
            action()
        self.now_s = end_s

    def tell(self, event: Event) -> None:
        if self.now_s < self._paused_until_s:
            self._backlog.append(event)
            return
        for command in self.controller.step(event, self.now_s):
            self.history.append(command)
            self._obey(command)

    def restart_controller(self) -> None:
        """A new term; live processes connect again and say what they use."""
        self.term += 1
        self._paused_until_s = self.now_s
        self._backlog: list[Event] = []  # what waits in a controller's streams ends with it
        last: dict[str, int] = {}
        for member in self.processes:
            last[member.id] = max(last.get(member.id, 0), member.incarnation)
        config = replace(self.config, pools=self.pools)
        self.controller = Controller(config, self.term, SHAPE, last, self.now_s)
        for process in self.processes.values():
            process.is_linked = False
            if process.is_alive and process.is_registered:
                self._at(self._delay(0.05, 1.0), lambda p=process: self._register(p))

    def pause_controller(self, seconds: float) -> None:
        """As SIGSTOP does: nothing is heard, no tick comes; all of it is delivered afterwards."""
        self._paused_until_s = max(self._paused_until_s, self.now_s + seconds)
        self._at_time(self._paused_until_s, self._resume)

    def _resume(self) -> None:
        if self.now_s >= self._paused_until_s:
            backlog, self._backlog = self._backlog, []
            for event in backlog:
                self.tell(event)

    def kill(self, member: Member, detail: str = "killed by the test") -> None:
        process = self.processes.get(member)
        if process is not None and process.is_alive:
            process.is_alive = False
            self._at(0.02, lambda: self.tell(Left(member)))
            self._at(0.05, lambda: self.tell(ActorDied(member, detail)))

    def freeze(self, member: Member, seconds: float) -> None:
        process = self.processes[member]
        process.frozen_until_s = max(process.frozen_until_s, self.now_s + seconds)

    def report(self, process: Process, body: object) -> None:
        process.is_linked |= isinstance(body, Register)
        if process.is_alive and process.is_linked:
            self.tell(Report(process.member, SHAPE.fingerprint, self.term, body))

    # Looking.

    def live(self, role: Role) -> list[Process]:
        return [p for p in self.processes.values() if p.role is role and p.is_alive]

    def one(self, worker_id: str) -> Process:
        """The live process of this id."""
        (process,) = [p for p in self.processes.values() if p.member.id == worker_id and p.is_alive]
        return process

    def sent(self, kind: type) -> list[Send]:
        return [c for c in self.history if isinstance(c, Send) and isinstance(c.body, kind)]

    def ordered(self, kind: type) -> list[Command]:
        return [c for c in self.history if isinstance(c, kind)]

    # What commands do, and what must never be commanded.

    def _obey(self, command: Command) -> None:
        match command:
            case StartWorker(role, member):
                assert member not in self.processes, f"{member} was started twice"
                twins = [p.member for p in self.live(role) if p.member.id == member.id]
                assert not twins, f"{member} was started while {twins} lived"
                self._spawn(role, member)
            case WatchWorker(member):
                process = self.processes.get(member)
                if process is None or not process.is_alive:
                    self._at(0.05, lambda: self.tell(ActorDied(member, "it is gone")))
            case KillWorker(member, pid, _, reason):
                process = self.processes.get(member)
                assert not pid or (process and process.pid == pid), f"{member} has another pid than {pid}"
                self.kill(member, reason)
            case Remember(version, pools):
                assert version > self.version
                self.version = version
                assert Pools.from_json(pools.to_json()) == pools
                self.pools = pools
            case Send(to, body):
                if process := self.processes.get(to):  # a stream keeps its order
                    process.heard_s = max(process.heard_s, self.now_s + self._delay(0.001, 0.01))
                    self._at_time(process.heard_s, lambda: self._deliver(process, body))

    def _deliver(self, process: Process, body: object) -> None:
        if not process.is_alive:
            return
        if self.now_s < process.frozen_until_s:
            self._at_time(process.frozen_until_s, lambda: self._deliver(process, body))
            return
        match body:
            case Exit():
                self._may_exit(process)
                self.kill(process.member, "told to exit")
            case Members() if process.role is Role.SCHEDULER:
                for member in body.draining:
                    self.processes[member].is_draining = True
            case Prepare(placement) if _num_slots(placement, process.member) > process.slots_max:
                self.report(process, Unprepared(placement.epoch, "its memory is full"))
            case Prepare(placement):  # one after the other
                process.busy_until_s = max(process.busy_until_s, self.now_s) + self._delay(0.1, 3.0)
                self._at_time(process.busy_until_s, lambda: self._prepared(process, placement))
            case Publish(placement):
                self.placements[placement.epoch] = placement
                for placed in placement.workers:
                    holder = self.processes[placed.member]
                    assert holder.held.get(placement.epoch) == frozenset(placed.experts), (
                        f"{placement.epoch} was published before {placed.member} had prepared it"
                    )
                self._at(self._delay(0.01, 0.5), lambda: self._adopted(process, placement.epoch))
            case Retire(epoch):
                users = [p.member for p in self.live(Role.ATTENTION) if p.epoch and p.epoch <= epoch]
                assert not users, f"{epoch} was retired while {users} use it or an older one"
                process.held = {held: slots for held, slots in process.held.items() if held > epoch}

    def _may_exit(self, process: Process) -> None:
        """Nobody may need it: unless the cluster ends, or another life has taken its place."""
        current = self.controller.roster.workers.get(process.member.id)
        if self.controller.phase in (Phase.DRAINING, Phase.STOPPING, Phase.STOPPED):
            return
        if current is None or current.incarnation != process.member.incarnation:
            return
        if process.role is Role.ATTENTION:
            is_empty = self.now_s >= process.empty_at_s or process.epoch is None
            assert is_empty, f"{process.member} was told to exit with sequences"
        for user in self.live(Role.ATTENTION):
            placed = self.placements[user.epoch].workers if user.epoch in self.placements else ()
            users = [w.member for w in placed]
            assert process.member not in users, f"{process.member} was told to exit while {user.member} uses it"

    def _prepared(self, process: Process, placement: object) -> None:
        (slots,) = [w.experts for w in placement.workers if w.member == process.member]
        process.held[placement.epoch] = frozenset(slots)
        process.epoch = placement.epoch
        self.report(process, Prepared(placement.epoch))

    def _adopted(self, process: Process, epoch: EpochId) -> None:
        if process.is_alive and (process.epoch is None or epoch >= process.epoch):
            process.epoch = epoch
            self.report(process, Adopted(epoch))
        for placed in self.controller.epochs.published.workers if self.controller.epochs.published else ():
            if not self.processes[placed.member].is_alive:
                self.report(process, PeerLost(placed.member))

    # Processes.

    def _spawn(self, role: Role, member: Member) -> None:
        process = Process(role, member, next(self._pids))
        self.processes[member] = process
        self._at(self._delay(0.5, 3.0), lambda: self._register(process))

    def _register(self, process: Process) -> None:
        if self.now_s < process.frozen_until_s:
            self._at_time(process.frozen_until_s, lambda: self._register(process))
            return
        reason = self.fails_to_start.get(process.member.id)
        body = Register(process.role, process.pid, "here", "cpu", f"@{process.member.id}", process.epoch)
        self.report(process, body)
        if reason is not None:
            self.report(process, Health(HealthState.FAILED, detail=reason))
        elif not process.is_registered:
            process.is_registered = True
            self._beat(process)

    def _health(self, process: Process) -> Health:
        if not process.is_draining:
            return Health(HealthState.READY)
        return Health(HealthState.DRAINING, gauges={"sequences_open": float(self.now_s < process.empty_at_s)})

    def _beat(self, process: Process) -> None:
        if process.is_alive:
            if self.now_s >= process.frozen_until_s:
                self.report(process, self._health(process))
            self._at(HEARTBEAT_S, lambda: self._beat(process))

    def _tick(self) -> None:
        self._at(TICK_S, self._tick)
        if self.now_s >= self._paused_until_s:
            self.tell(Tick())

    def _delay(self, least_s: float, most_s: float) -> float:
        return self.random.uniform(least_s, most_s)

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._at_time(self.now_s + delay_s, action)

    def _at_time(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), action))


def _num_slots(placement: Placement, member: Member) -> int:
    return sum(len(w.experts) for w in placement.workers if w.member == member)


def ready(config: ControllerConfig = TWO_BY_THREE) -> World:
    world = World(config)
    world.run(20)
    assert world.controller.phase is Phase.READY
    return world


def state(world: World, worker_id: str) -> WorkerState:
    return world.controller.roster.workers[worker_id].state

"""The real scheduler and controller in simulated processes: as `scheduler.server`, `scheduler_process` and
`controller_server` drive them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from expertmesh.v1 import schedule_pb2

from cluster.controller import Controller, ControllerConfig
from cluster.events import (
    ActorDied,
    Command,
    Drain,
    Event,
    Exit,
    KillWorker,
    Left,
    Members,
    Order,
    OrderBody,
    Rebalance,
    Register,
    Remember,
    Report,
    Resize,
    Role,
    Send,
    StartWorker,
    Tick,
    WatchWorker,
)
from cluster.scaling import Refused
from cluster.scheduler import events as scheduling
from cluster.scheduler import wire
from cluster.scheduler.core import Scheduler
from cluster.sim.arithmetic import SHAPE
from cluster.sim.attention_links import SCHEDULER
from cluster.sim.member_link import CONTROLLER, MemberLink
from cluster.sim.network import End, Network
from cluster.sim.process import Bell, Process, Work
from cluster.sim.settings import COMPANION_DEADLINE_S, HEARTBEAT_S
from cluster.sim.settings import SCHEDULER as CONFIG
from cluster.watch import TurnWatch
from router.membership import Health, HealthState
from router.placement import Member

INBOX_MAX = 4096


class SchedulerShell:
    def __init__(
        self, process: Process, network: Network, scheduler: Scheduler, kill_controller: Callable[[int], None]
    ) -> None:
        """`kill_controller`: by its pid."""
        self.process, self.scheduler = process, scheduler
        self.has_changed = False  # since it was last checked
        self._links: dict[scheduling.Incarnation, End] = {}
        self._inbox: deque[scheduling.Event] = deque()
        self._wake = Bell()
        self._heard, self._controller_pid = 0, 0  # words of a controller, and whose
        self._watch = TurnWatch({CONTROLLER: COMPANION_DEADLINE_S})
        self._kill_controller = kill_controller
        self.member_link = MemberLink(process, network, self._register, self._health, self._obey)
        network.listen(SCHEDULER, process, self._accept)
        self.member_link.start()
        process.spawn(self._turn_forever())
        process.after(HEARTBEAT_S, self._watch_controller)

    def _register(self) -> Register:
        return Register(Role.SCHEDULER, self.process.pid, self.process.node, "cpu", SCHEDULER)

    def _health(self) -> Health:
        return Health(HealthState.READY)

    def _obey(self, order: OrderBody) -> None:
        match order:
            case Members(attention, pid, _, draining):
                self._heard += 1
                self._controller_pid = pid
                self._post(scheduling.MembersExpected(_incarnations(attention), _incarnations(draining)))
            case Exit(reason):
                self.process.after(0.05, lambda: self.process.end(f"told to exit: {reason}"))

    def _watch_controller(self) -> None:
        if self._watch.look({CONTROLLER: self._heard}, self.process.now_s()) and self._controller_pid:
            self._kill_controller(self._controller_pid)
            self._controller_pid = 0
        self.process.after(HEARTBEAT_S, self._watch_controller)

    # Streams.

    def _accept(self, end: End) -> None:
        end.on_message = lambda hello: self._greet(end, hello)

    def _greet(self, end: End, hello: Any) -> None:
        peer = wire.decode_incarnation(hello.sender)
        is_gateway = isinstance(hello, schedule_pb2.GatewayMessage)
        before = self._links.get(peer)
        self._links[peer] = end
        if before is not None:
            before.close(f"{peer} has joined again")
        end.on_message = lambda message: self._hear(end, peer, message, is_gateway)
        end.on_end = lambda _why: self._lose(end, peer, is_gateway)
        self._hear(end, peer, hello, is_gateway)

    def _hear(self, end: End, peer: scheduling.Incarnation, message: Any, is_gateway: bool) -> None:
        if message.term > self.scheduler.term:
            self.process.end(f"superseded by term {message.term}")
        elif self._links.get(peer) is end:  # else it has joined again: what this stream said is void
            decoded = (
                wire.decode_gateway(message, peer, CONFIG) if is_gateway else wire.decode_worker(message, peer)
            )
            self._post(decoded)

    def _lose(self, end: End, peer: scheduling.Incarnation, is_gateway: bool) -> None:
        if self._links.get(peer) is end:
            del self._links[peer]
            self._post(scheduling.GatewayLost(peer) if is_gateway else scheduling.WorkerLost(peer))

    def _drop(self, peer: scheduling.Incarnation, end: End, why: str) -> None:
        """Closed by us: the stream's task ends, and says so."""
        end.close(why)
        is_gateway = not peer.id.startswith(Role.ATTENTION.value)
        self.process.after(0.0, lambda: self._lose(end, peer, is_gateway))

    # Turning.

    def _post(self, event: scheduling.Event) -> None:
        assert len(self._inbox) < INBOX_MAX, f"{self.process}: {INBOX_MAX} events unread"
        self._inbox.append(event)
        self._wake.ring()

    def _turn_forever(self) -> Work:
        while True:
            yield self._wake, CONFIG.tick_s
            now_s = self.process.now_s()
            self.has_changed |= bool(self._inbox)
            for _ in range(len(self._inbox)):
                self._send(self.scheduler.step(self._inbox.popleft(), now_s))
            self._send(self.scheduler.step(scheduling.Tick(), now_s))
            self._send(self.scheduler.round(now_s))

    def _send(self, commands: list[scheduling.Command]) -> None:
        self.has_changed |= bool(commands)
        for command in commands:
            end = self._links.get(command.to)
            if end is None or not end.is_open:
                continue  # settled when this peer joins again
            if isinstance(command, scheduling.DropLink):
                self._drop(command.to, end, command.reason)
            else:
                end.send(wire.encode(command, self.scheduler.term, SHAPE.fingerprint))


def _incarnations(members: Iterable[Member]) -> frozenset[scheduling.Incarnation]:
    return frozenset(scheduling.Incarnation(member.id, member.incarnation) for member in members)


class Driver(Protocol):
    """A WorkerDriver, and who hears of what it does."""

    def start_worker(self, command: StartWorker) -> None: ...
    def watch(self, command: WatchWorker) -> None: ...
    def kill(self, command: KillWorker) -> None: ...
    def remember(self, command: Remember) -> None: ...


class ControllerShell:
    def __init__(self, process: Process, network: Network, driver: Driver, config: ControllerConfig, term: int,
                 incarnations: dict[str, int], on_command: Callable[[Command], None]) -> None:  # fmt: skip
        """`on_command` sees each command before it is acted upon."""
        self.process = process
        self.controller = Controller(config, term, SHAPE, incarnations, process.now_s())
        self._driver, self._on_command = driver, on_command
        self._streams: dict[Member, End] = {}
        network.listen(CONTROLLER, process, self._accept)

    def start(self) -> None:
        self._tick()

    def died(self, event: ActorDied) -> None:
        """From the driver."""
        self.process.do(lambda: self._turn(event))

    def ask(self, asked: Resize | Drain) -> Refused | None:
        """A person's wish. Why it is refused; None: it is followed."""
        refused = self.controller.refusal(asked)
        if refused is None:
            self.process.do(lambda: self._turn(asked))
        return refused

    def rebalance(self, takes_s: float) -> str:
        """As `controller_server` does: worked out from what there is, and told when that has taken its time. What
        became of it; empty: it is under way."""
        task = self.controller.rebalancing()
        if task is None:
            return "a placement is being prepared, a worker is away, or none is in use"
        proposal = task.propose()
        if proposal.is_empty:
            return "nothing is worth moving"
        self.process.after(takes_s, lambda: self._turn(Rebalance(proposal)))
        return ""

    def _tick(self) -> None:
        self._turn(Tick())
        self.process.after(HEARTBEAT_S / 2, self._tick)

    def _accept(self, end: End) -> None:
        end.on_message = lambda report: self._meet(end, report)

    def _meet(self, end: End, report: Report) -> None:
        """The first of a stream is a Register."""
        if report.term > self.controller.term:
            end.close(f"superseded by term {report.term}")
            return
        before = self._streams.get(report.sender)
        if before is not None:
            before.close("it has joined again")
        self._streams[report.sender] = end
        end.on_message = lambda report: self._hear(end, report)
        end.on_end = lambda _why: self._left(end, report.sender)
        self._turn(report)

    def _hear(self, end: End, report: Report) -> None:
        if self._streams.get(report.sender) is end:
            self._turn(report)

    def _left(self, end: End, member: Member) -> None:
        if self._streams.get(member) is end:
            del self._streams[member]
            self._turn(Left(member))

    def _turn(self, event: Event) -> None:
        for command in self.controller.step(event, self.process.now_s()):
            self._on_command(command)
            match command:
                case Send(to, body):
                    end = self._streams.get(to)
                    if end is not None and end.is_open:
                        end.send(Order(self.controller.term, SHAPE.fingerprint, body))
                case StartWorker():
                    self._driver.start_worker(command)
                case WatchWorker():
                    self._driver.watch(command)
                case KillWorker():
                    self._driver.kill(command)
                case Remember():
                    self._driver.remember(command)

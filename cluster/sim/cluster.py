"""All processes of a simulated cluster, and what stands for Ray: starts, ends, and who is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from cluster.controller import ControllerConfig
from cluster.events import ActorDied, Command, KillWorker, Remember, Role, StartWorker, WatchWorker
from cluster.scheduler.core import Scheduler
from cluster.sim import settings
from cluster.sim.arithmetic import SHAPE
from cluster.sim.attention import AttentionShell
from cluster.sim.deciders import ControllerShell, SchedulerShell
from cluster.sim.experts import ExpertShell
from cluster.sim.gateways import GatewayShell
from cluster.sim.network import Network
from cluster.sim.process import Process
from cluster.sim.scenario import Shape
from cluster.sim.world import World
from router.placement import Member

Shell: TypeAlias = AttentionShell | ExpertShell | GatewayShell | SchedulerShell | ControllerShell

DEATH_TOLD_S = (0.01, 0.3)  # until Ray's word of a death has come
NODE_DEATH_TOLD_S = (1.0, 4.0)  # and of a whole node's
RESTART_S = (0.2, 1.0)  # of a decider or gateway
DECIDERS = ("scheduler", "controller")


class Cluster:
    """`on_turn` is told each shell whenever its process has done something; `on_command` what a controller orders,
    before it is done."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world, self.shape = world, shape
        self.network = Network(world)
        self.shells: dict[Member, Shell] = {}
        self.gateways: list[GatewayShell] = []  # alive
        self.counts: Counter[str] = Counter()
        self.on_turn: Callable[[Shell], None] = lambda _shell: None
        self.on_command: Callable[[ControllerShell, Command], None] = lambda _shell, _command: None
        self.on_gateway_end: Callable[[GatewayShell], None] = lambda _gateway: None
        self._newest: dict[str, int] = {}  # the numbers of lives, as the cluster's key-value store has them
        self._pids = 100
        self._pools: Remember | None = None  # as it was last kept for the next controller
        self._kills: list[Process] = []  # on nodes that cannot be reached now
        self._watched: set[Member] = set()

    def start(self) -> None:
        for name in (*DECIDERS, *(f"gateway-{i}" for i in range(self.shape.gateways))):
            self.start_companion(name)

    # Looking.

    def find(self, name: str) -> Shell | None:
        """The newest life of this id, if it lives."""
        shell = self.shells.get(Member(name, self._newest.get(name, 0)))
        return shell if shell is not None and shell.process.is_alive else None

    @property
    def controller(self) -> ControllerShell | None:
        found = self.find("controller")
        return found if isinstance(found, ControllerShell) else None

    def living(self) -> list[Shell]:
        return [shell for shell in self.shells.values() if shell.process.is_alive]

    # Lives.

    def start_companion(self, name: str) -> None:
        """A decider or gateway: its next life."""
        self._newest[name] = self._newest.get(name, 0) + 1
        member = Member(name, self._newest[name])
        process = self._process(member, 0 if name in DECIDERS else int(name.rpartition("-")[2]))
        process.on_end.append(lambda _why: self._companion_ended(member))
        if name == "scheduler":
            scheduler = Scheduler(settings.SCHEDULER, member.incarnation, SHAPE.fingerprint)
            self._add(SchedulerShell(process, self.network, scheduler, self._kill_pid))
        elif name == "controller":
            self._add(self._controller(process))
        else:
            gateway = GatewayShell(process, self.network)
            process.on_end.append(lambda _why: self._gateway_ended(gateway))
            self.gateways.append(gateway)
            self._add(gateway)

    def _controller(self, process: Process) -> ControllerShell:
        shape = self.shape
        config = ControllerConfig(
            shape.attention, shape.experts, shape.replicas, companion_deadline_s=settings.COMPANION_DEADLINE_S,
            pid=process.pid, node=process.node, patience=settings.PATIENCE,
            balancer=settings.balancer(shape.spare),
            pools=self._pools.pools if self._pools else None,
        )  # fmt: skip
        incarnations = {name: n for name, n in self._newest.items() if name.startswith(("attention-", "expert-"))}
        shell: list[ControllerShell] = []
        made = ControllerShell(
            process, self.network, self, config, process.member.incarnation, incarnations,
            lambda command: self.on_command(shell[0], command),
        )  # fmt: skip
        shell.append(made)
        made.start()
        return made

    def _companion_ended(self, member: Member) -> None:
        if self._newest[member.id] == member.incarnation:
            self.counts["restarts"] += 1
            told = NODE_DEATH_TOLD_S if self._is_on_lost_node(member) else RESTART_S
            self.world.at(self.world.between(*told), lambda: self._restart(member))

    def _restart(self, member: Member) -> None:
        if self._newest[member.id] == member.incarnation:
            self.start_companion(member.id)

    def _gateway_ended(self, gateway: GatewayShell) -> None:
        self.gateways.remove(gateway)
        self.on_gateway_end(gateway)

    def _process(self, member: Member, place: int) -> Process:
        self._pids += 1
        process = Process(self.world, member, self._node(place), self._pids)
        self.network.joined(process)
        process.on_end.append(lambda why: self.world.tell(f"{process} ends: {why}"))
        return process

    def _node(self, place: int) -> str:
        """The first from its own on that can be reached."""
        nodes = [f"node-{(place + i) % self.shape.nodes}" for i in range(self.shape.nodes)]
        return next(node for node in nodes if self._is_reached(node))

    def _is_reached(self, node: str) -> bool:
        return node not in self.network.lost and frozenset(("node-0", node)) not in self.network.cuts

    def _is_on_lost_node(self, member: Member) -> bool:
        return self.shells[member].process.node in self.network.lost

    def _add(self, shell: Shell) -> None:
        self.shells[shell.process.member] = shell
        shell.process.on_done = lambda _process: self.on_turn(shell)
        self.world.tell(f"{shell.process} starts on {shell.process.node}")

    def _kill_pid(self, pid: int) -> None:
        for shell in self.living():
            if shell.process.pid == pid:
                shell.process.end("killed: silent for too long")

    # A WorkerDriver.

    def start_worker(self, command: StartWorker) -> None:
        member = command.member
        if self._newest.get(member.id, 0) >= member.incarnation:
            self._tell_death(member, "this incarnation was taken by another controller", DEATH_TOLD_S)
            return
        self._newest[member.id] = member.incarnation
        self.counts["starts"] += 1
        self._watched.add(member)
        self.world.at(self.world.between(*settings.START_S), lambda: self._begin(command))

    def _begin(self, command: StartWorker) -> None:
        member = command.member
        if member not in self._watched:
            return  # killed before it began
        process = self._process(member, int(member.id.rpartition("-")[2]))
        process.on_end.append(lambda why: self._worker_ended(member, why))
        router = settings.router("sums" if self.shape.sums else "rows")
        if command.role is Role.EXPERT:
            self._add(ExpertShell(process, self.network, router))
        else:
            self._add(AttentionShell(
                process, self.network, router, "sums" if self.shape.sums else "rows",
                is_hybrid=bool(self.shape.hybrid), microbatches=self.shape.microbatches,
            ))  # fmt: skip

    def _worker_ended(self, member: Member, why: str) -> None:
        told = NODE_DEATH_TOLD_S if self._is_on_lost_node(member) else DEATH_TOLD_S
        self._tell_death(member, why, told)

    def _tell_death(self, member: Member, why: str, after_s: tuple[float, float]) -> None:
        def tell() -> None:
            controller = self.controller
            if controller is not None:
                controller.died(ActorDied(member, why))

        self.world.at(self.world.between(*after_s), tell)

    def watch(self, command: WatchWorker) -> None:
        shell = self.shells.get(command.member)
        is_starting = shell is None and command.member in self._watched
        if not is_starting and (shell is None or not shell.process.is_alive):
            self._tell_death(command.member, "it is gone", DEATH_TOLD_S)

    def kill(self, command: KillWorker) -> None:
        shell = self.shells.get(command.member)
        self.world.tell(f"{command.member.id}#{command.member.incarnation} is lost: {command.reason}")
        self.counts["lost"] += 1
        if shell is None:
            self._watched.discard(command.member)
        elif self._is_reached(shell.process.node):
            shell.process.end("killed by the controller")
        else:
            self._kills.append(shell.process)

    def remember(self, command: Remember) -> None:
        if self._pools is None or command.version > self._pools.version:
            self._pools = command

    def reached_again(self) -> None:
        """A cut was healed: kills that waited for it are done."""
        for process in list(self._kills):
            if self._is_reached(process.node):
                self._kills.remove(process)
                process.end("killed by the controller")

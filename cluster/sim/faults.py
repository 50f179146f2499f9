"""Faults made real, and healed."""

from __future__ import annotations

from collections.abc import Callable

from cluster.events import Drain, Resize
from cluster.sim import settings
from cluster.sim.attention import AttentionShell
from cluster.sim.cluster import DECIDERS, Cluster, Shell
from cluster.sim.member_link import CONTROLLER
from cluster.sim.scenario import Fault, Scenario

FLAPS, FLAP_S = 16, 0.1  # of the streams of those between two deciders


class Faults:
    def __init__(self, cluster: Cluster, scenario: Scenario) -> None:
        self._cluster, self._world = cluster, cluster.world
        self._is_healed = False
        does: dict[str, Callable[[Fault], None]] = {
            "kill": self._kill, "freeze": self._freeze, "slow": self._slow, "flap": self._flap, "cut": self._cut,
            "lose": self._lose, "usurp": self._usurp, "drop": self._drop, "twice": self._twice,
            "resize": self._resize, "drain": self._drain, "rebalance": self._rebalance, "sever": self._sever,
        }  # fmt: skip
        for fault in scenario.faults:
            self._world.at(fault.at_s, lambda fault=fault: self._begin(does[fault.verb], fault))  # type: ignore[misc]
        self._world.at(scenario.heal_s, self.heal)

    def _begin(self, do: Callable[[Fault], None], fault: Fault) -> None:
        if not self._is_healed:
            self._cluster.counts["faults"] += 1
            self._world.tell(f"-- {str(fault).partition(' ')[2].partition(' ')[2]}")
            do(fault)

    def heal(self) -> None:
        """All faults end; a decider that another has taken the place of is found by Ray, and killed."""
        self._is_healed = True
        self._world.tell("-- heal")
        network = self._cluster.network
        network.parcel_loss = network.parcel_twice = 0.0
        network.severed.clear()
        for nodes in list(network.cuts):
            self._heal_cut(nodes)
        for shell in self._cluster.living():
            shell.process.slow = 1.0
            shell.process.thaw()
            name = shell.process.member.id
            if name in DECIDERS and self._cluster.find(name) is not shell:
                shell.process.end("killed: another has taken its place")

    def _target(self, fault: Fault) -> Shell | None:
        found = self._cluster.find(fault.target)
        if found is None:
            self._world.tell(f"   {fault.target} does not live now")
        return found

    def _kill(self, fault: Fault) -> None:
        if shell := self._target(fault):
            shell.process.end("killed")

    def _freeze(self, fault: Fault) -> None:
        if shell := self._target(fault):
            process = shell.process
            process.freeze()
            self._cluster.network.silenced(lambda silent: silent is process)
            self._world.at(fault.for_s, process.thaw)

    def _slow(self, fault: Fault) -> None:
        if shell := self._target(fault):
            process = shell.process
            process.slow = fault.amount
            self._world.at(fault.for_s, lambda: setattr(process, "slow", 1.0))

    def _flap(self, fault: Fault) -> None:
        if shell := self._target(fault):
            self._cluster.network.flap(shell.process)

    def _sever(self, fault: Fault) -> None:
        """This life alone: what is wrong with it does not befall its successor."""
        if shell := self._target(fault):
            process, network = shell.process, self._cluster.network
            network.sever(process)
            self._world.at(fault.for_s, lambda: network.severed.discard(process))

    def _cut(self, fault: Fault) -> None:
        for other in range(self._cluster.shape.nodes):
            nodes = frozenset((fault.target, f"node-{other}"))
            if len(nodes) == 2 and nodes not in self._cluster.network.cuts:
                self._cluster.network.cut(nodes)
                self._world.at(fault.for_s, lambda nodes=nodes: self._heal_cut(nodes))  # type: ignore[misc]

    def _heal_cut(self, nodes: frozenset[str]) -> None:
        if nodes in self._cluster.network.cuts:
            self._cluster.network.heal(nodes)
            self._cluster.reached_again()

    def _lose(self, fault: Fault) -> None:
        if fault.target in self._cluster.network.lost:
            return
        self._cluster.network.lose(fault.target)
        for shell in self._cluster.living():
            if shell.process.node == fault.target:
                shell.process.end("its node is lost")

    def _usurp(self, fault: Fault) -> None:
        """The first is cut off from the controller, and taken for dead. Streams break again and again, so that
        some reach the one and some the other: at first only those of attention workers."""
        shell = self._target(fault)
        if shell is None:
            return
        self._cluster.network.shunned.add((shell.process, CONTROLLER))
        self._cluster.network.flap(shell.process)
        self._cluster.start_companion(fault.target)
        for number in range(FLAPS):
            is_late = number >= FLAPS // 2
            self._world.at(FLAP_S * (number + 1), lambda is_late=is_late: self._flap_some(fault.target, is_late))  # type: ignore[misc]

    def _flap_some(self, decider: str, is_late: bool) -> None:
        for shell in self._cluster.living():
            is_meant = is_late or isinstance(shell, AttentionShell)
            if is_meant and shell.process.member.id not in DECIDERS and self._world.rng.random() < 0.6:
                self._cluster.network.flap(shell.process, decider)

    def _resize(self, fault: Fault) -> None:
        pool, _, size = fault.target.partition("=")
        if pool not in ("attention", "experts") or not size.isdecimal():
            raise ValueError(f"resize: {fault.target!r}; accepted: attention=N or experts=N")
        self._ask(Resize(**{pool: int(size)}))

    def _drain(self, fault: Fault) -> None:
        self._ask(Drain(fault.target))

    def _rebalance(self, _fault: Fault) -> None:
        controller = self._cluster.controller
        takes_s = self._world.between(*settings.BALANCE_S)
        why = controller.rebalance(takes_s) if controller is not None else "there is no controller"
        if why:
            self._world.tell(f"   not rebalanced: {why}")
        else:
            self._cluster.counts["rebalanced"] += 1

    def _ask(self, asked: Resize | Drain) -> None:
        controller = self._cluster.controller
        refused = controller.ask(asked) if controller is not None else "there is no controller"
        if refused is not None:
            self._world.tell(f"   refused: {refused}")

    def _drop(self, fault: Fault) -> None:
        self._cluster.network.parcel_loss = fault.amount
        self._world.at(fault.for_s, lambda: setattr(self._cluster.network, "parcel_loss", 0.0))

    def _twice(self, fault: Fault) -> None:
        self._cluster.network.parcel_twice = fault.amount
        self._world.at(fault.for_s, lambda: setattr(self._cluster.network, "parcel_twice", 0.0))

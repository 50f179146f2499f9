"""Streams between processes: ordered, delayed, broken by deaths, silence and whoever wants it broken.

What a stream carries arrives in order or not at all: when it breaks, the end of what was sent is lost. Nodes that
are cut apart hold what was sent until the cut is healed; a peer that is silent for `KEEPALIVE_S` counts as gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cluster.sim.process import Process
from cluster.sim.world import Action, World

LATENCY_S = (0.0001, 0.002)
FAR_LATENCY_S = (0.0005, 0.02)  # between nodes
KEEPALIVE_S = 5.0
CONNECT_S = 1.0  # until a connection to one that cannot be reached is given up
EXCHANGE = "@"  # what expert workers' addresses begin with
HELD_MAX = 4096  # messages of one stream that have not arrived: more is a queue without a bound

OnMessage = Callable[[Any], None]
OnEnd = Callable[[str], None]


class End:
    """One side of a stream. Give `on_message` and `on_end` before the first can arrive; `on_end` is called once,
    and never after `close`."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network, self.process = network, process
        self.on_message: OnMessage = lambda _message: None
        self.on_end: OnEnd = lambda _why: None
        self.is_open = True
        self.peer: End | None = None  # nobody listened
        self.address = ""  # where it was connected to
        self._sent = self._arrived = 0
        self._lost_from: int | None = None
        self._last_s = 0.0
        self.held: list[Action] = []  # behind a cut

    def send(self, message: Any) -> None:
        if self.is_open and self.peer is not None:
            number, peer, self._sent = self._sent, self.peer, self._sent + 1
            assert self._sent - self._arrived <= HELD_MAX, f"{self.process}: {HELD_MAX} messages have not arrived"
            self._post(peer, lambda: self._deliver(peer, number, message))

    def close(self, why: str = "closed") -> None:
        """Idempotent. What was sent before arrives."""
        peer, was_open, self.is_open = self.peer, self.is_open, False
        if was_open and peer is not None:
            self._post(peer, lambda: peer.process.do(lambda: peer.ended(why)))

    def cut_off(self, why: str) -> None:
        """Its process has died, or the way to the peer has: some of what was sent last is lost."""
        self._lost_from = self.network.world.rng.randint(self._arrived, self._sent)
        self.close(why)

    def ended(self, why: str) -> None:
        """The other side has ended."""
        if self.is_open:
            self.is_open = False
            self.on_end(why)

    def connected(self, peer: End, accept: Action) -> None:
        self.peer = peer
        self._post(peer, accept)

    def _post(self, peer: End, arrive: Action) -> None:
        world = self.network.world
        self._last_s = max(self._last_s, world.now_s + self.network.latency_s(self.process, peer.process))
        world.at(self._last_s - world.now_s, lambda: self._pass(peer, arrive))

    def _pass(self, peer: End, arrive: Action) -> None:
        if self.held or self.network.is_cut(self.process, peer.process):
            self.held.append(arrive)
        else:
            arrive()

    def _deliver(self, peer: End, number: int, message: Any) -> None:
        if self._lost_from is None or number < self._lost_from:
            self._arrived += 1
            peer.process.do(lambda: peer.take(message))

    def take(self, message: Any) -> None:
        if self.is_open:
            self.on_message(message)


class Network:
    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: dict[frozenset[str], float] = {}  # pairs of nodes, since when
        self.lost: dict[str, float] = {}  # nodes, since when
        self.shunned: set[tuple[Process, str]] = set()  # who is not let in where
        self.severed: set[Process] = set()  # who can make no link of the exchange
        self.parcel_loss = self.parcel_twice = 0.0  # how many of the exchange's parcels are lost, or come twice
        self._doors: dict[str, list[tuple[Process, Callable[[End], None]]]] = {}
        self._ends: dict[Process, list[End]] = {}

    def listen(self, address: str, process: Process, accept: Callable[[End], None]) -> None:
        self._doors.setdefault(address, []).append((process, accept))

    def joined(self, process: Process) -> None:
        """Its streams break when it ends."""
        process.on_end.append(lambda why: self._died(process, why))

    def connect(self, process: Process, address: str, on_message: OnMessage, on_end: OnEnd) -> End:
        """To whoever listens there: the newest, or for a moment still an older one."""
        near = End(self, process)
        near.on_message, near.on_end, near.address = on_message, on_end, address
        doors = [door for door in self._doors.get(address, ()) if door[0].is_alive]
        self._doors[address] = doors
        severed = address.startswith(EXCHANGE) and doors and {process, doors[-1][0]} & self.severed
        if not doors or severed or (process, address) in self.shunned:
            process.after(self.world.between(*LATENCY_S), lambda: near.ended("refused"))
            return near
        door, accept = doors[-1] if len(doors) == 1 or self.world.rng.random() < 0.6 else doors[0]
        far = End(self, door)
        far.peer = near
        for end in (near, far):
            self._ends.setdefault(end.process, []).append(end)
        if self._silent_since(process, door) is not None:
            process.after(CONNECT_S, lambda: self._give_up(near, CONNECT_S))
        near.connected(far, lambda: door.do(lambda: accept(far)))
        return near

    def latency_s(self, one: Process, other: Process) -> float:
        return self.world.between(*(LATENCY_S if one.node == other.node else FAR_LATENCY_S))

    def is_cut(self, one: Process, other: Process) -> bool:
        return frozenset((one.node, other.node)) in self.cuts or one.node in self.lost or other.node in self.lost

    # Silence.

    def silenced(self, is_silent: Callable[[Process], bool]) -> None:
        """Something has just fallen silent: streams of these processes break when it stays so."""
        ends = [end for process in list(self._ends) if is_silent(process) for end in self._ends[process]]
        for end in ends:
            if end.is_open:
                self.world.at(KEEPALIVE_S, lambda end=end: self._give_up(end, KEEPALIVE_S))  # type: ignore[misc]

    def cut(self, nodes: frozenset[str]) -> None:
        self.cuts[nodes] = self.world.now_s
        self.silenced(lambda process: process.node in nodes)

    def lose(self, node: str) -> None:
        """The node is gone, and nobody says so."""
        self.lost[node] = self.world.now_s
        self.silenced(lambda process: process.node == node)

    def heal(self, nodes: frozenset[str]) -> None:
        """What was held arrives now, in order."""
        self.cuts.pop(nodes, None)
        for ends in list(self._ends.values()):
            for end in ends:
                if end.held and end.peer and not self.is_cut(end.process, end.peer.process):
                    held, end.held = end.held, []
                    for arrive in held:
                        arrive()

    def flap(self, process: Process, address: str = "") -> None:
        """Break all its streams once, or those to one address."""
        self._break(end for end in self._open(process) if not address or end.address == address)

    def sever(self, process: Process) -> None:
        """Break its links of the exchange, and let it make no more."""
        self.severed.add(process)
        near_and_far = [(end, end.peer) for end in self._open(process) if end.peer is not None]
        self._break(end for end, far in near_and_far if (end.address or far.address).startswith(EXCHANGE))

    def _break(self, ends: Iterable[End]) -> None:
        for end in ends:
            end.cut_off("broken")
            end.process.do(lambda end=end: end.on_end("broken"))  # type: ignore[misc]

    def _open(self, process: Process) -> list[End]:
        ends = self._ends[process] = [end for end in self._ends.get(process, ()) if end.is_open]
        return list(ends)

    def _died(self, process: Process, why: str) -> None:
        for end in self._open(process):
            end.cut_off(why)

    def _give_up(self, end: End, after_s: float) -> None:
        """Both sides find the other silent, each when it next looks; not when it has spoken meanwhile."""
        if end.peer is None:
            return
        since_s = self._silent_since(end.process, end.peer.process)
        if since_s is None or self.world.now_s - since_s < after_s * 0.9:
            return
        for side in (end, end.peer):
            if side.is_open:
                side._lost_from = side._arrived
                side.process.do(lambda side=side: side.ended("silent"))  # type: ignore[misc]

    def _silent_since(self, one: Process, other: Process) -> float | None:
        since = [process.frozen_since_s for process in (one, other)]
        since += [self.cuts.get(frozenset((one.node, other.node)))]
        since += [self.lost.get(process.node) for process in (one, other)]
        known = [at_s for at_s in since if at_s is not None]
        return min(known) if known else None

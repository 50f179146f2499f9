"""The balancer as the controller has it: it hears of load, arranges experts and proposes to rearrange them. Pure.

A proposal is worked out from a `Task`, which is immutable: in any thread, off everybody's way. It is accepted only
if the placement it began with is still in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.balancer.config import BalancerConfig
from cluster.balancer.layer import Loads
from cluster.balancer.load_book import LoadBook
from cluster.balancer.place import Policy, place
from cluster.balancer.table import Room, Table, even_slots
from router.membership import ExpertLoad
from router.placement import EpochId, Member, Placement


class Home(Protocol):
    """Where a worker is, as it has registered."""

    @property
    def address(self) -> str: ...

    @property
    def node(self) -> str: ...


@dataclass(frozen=True)
class Task:
    """Everything that a placement follows from. load [L, E] is nobody else's."""

    fingerprint: str
    rooms: tuple[Room, ...]
    load: Loads
    current: Placement | None
    policy: Policy

    def solve(self, epoch: EpochId) -> Placement:
        """Raises PlacementError."""
        return place(epoch, self.fingerprint, self.rooms, self.load, self.current, self.policy)

    def propose(self) -> Proposal:
        """What rebalancing `current`, which there must be, would do. Takes seconds for large models."""
        assert self.current is not None
        after = self.solve(self.current.epoch)
        moves, dropped = _moves(self.current, after)
        before = self._imbalance(self.current)
        return Proposal(self.current, after, moves, dropped, before, self._imbalance(after))

    def _imbalance(self, placement: Placement) -> float | None:
        if not self.load.any():
            return None
        table = Table(self.rooms, self.load, self.policy.replicas, placement, None)
        return table.busiest / table.mean


@dataclass(frozen=True)
class Move:
    layer: int
    expert: int
    to: str  # id of the worker that loads it
    source: str | None  # of the one that gives it up; None: a further replica


@dataclass(frozen=True)
class Proposal:
    before: Placement
    after: Placement  # its epoch is that of `before`, until it is accepted
    moves: tuple[Move, ...]
    dropped: int  # replicas given up
    imbalance_before: float | None  # the busiest worker's load over the mean, summed over layers; None: no load
    imbalance_after: float | None

    @property
    def is_empty(self) -> bool:
        return self.before.workers == self.after.workers


class Balancer:
    def __init__(self, config: BalancerConfig, num_layers: int, num_experts: int, replicas: int) -> None:
        self.config = config
        self.shape = (num_layers, num_experts)
        self.replicas = replicas
        self.book = LoadBook(num_layers, num_experts, config.load_half_life_s, config.rows_per_read)

    def hear(self, member: Member, counted: ExpertLoad, now_s: float) -> None:
        if counted.slots:
            self.book.hear(member, counted, now_s)

    def task(
        self, fingerprint: str, here: Mapping[Member, Home], current: Placement | None, moves_max: int
    ) -> Task:
        """For the workers that are here, in their order; each has slots for its even share and the spares."""
        replicas = min(self.replicas, len(here))
        slots = even_slots(*self.shape, replicas, len(here), self.config.spare_slots)
        rooms = tuple(Room(member, home.address, home.node, slots) for member, home in here.items())
        policy = Policy(replicas, moves_max, self.config.slack, self.config.gain_min)
        return Task(fingerprint, rooms, self.book.load, current, policy)


def _moves(before: Placement, after: Placement) -> tuple[tuple[Move, ...], int]:
    """What workers load, and how many replicas are given up for nothing in return."""
    was, now = _holders(before), _holders(after)
    moves, dropped = [], 0
    for slot in sorted(now):
        old, new = was.get(slot, []), now[slot]
        gone = [worker for worker in old if worker not in new]
        for worker in new:
            if worker not in old:
                moves.append(Move(*slot, worker, gone.pop(0) if gone else None))
        dropped += len(gone)
    return tuple(moves), dropped


def _holders(placement: Placement) -> dict[tuple[int, int], list[str]]:
    holders: dict[tuple[int, int], list[str]] = {}
    for worker in placement.workers:
        for slot in worker.experts:
            holders.setdefault(slot, []).append(worker.member.id)
    return holders

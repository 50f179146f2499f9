"""Which expert worker holds which expert of which layer: an immutable, versioned table.

A worker has slots; each slot holds one (layer, expert). Several slots on distinct workers may hold the same
expert: its replicas. Pure: no tensors of the model, no links, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.errors import PlacementError


@dataclass(frozen=True, order=True)
class EpochId:
    """The version of a placement: the controller's term, then a count within it."""

    term: int
    number: int


@dataclass(frozen=True, order=True)
class Member:
    """One life of one process: a higher incarnation of the same id supersedes a lower one."""

    id: str
    incarnation: int


@dataclass(frozen=True)
class PlacedWorker:
    member: Member
    address: str
    experts: tuple[tuple[int, int], ...]  # (layer, expert) of each slot, in slot order


@dataclass(frozen=True)
class Placement:
    epoch: EpochId
    fingerprint: str
    num_layers: int
    num_experts: int  # of one layer
    workers: tuple[PlacedWorker, ...]

    def validate(self, partial: bool = False) -> None:
        """Raise PlacementError naming what contradicts. `partial` allows experts that nobody holds."""
        seen: set[str] = set()
        for worker in self.workers:
            name = worker.member.id
            if name in seen:
                raise PlacementError(f"workers: {name!r} appears twice")
            seen.add(name)
            held: set[tuple[int, int]] = set()
            for layer, expert in worker.experts:
                if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
                    raise PlacementError(
                        f"worker {name!r}: holds (layer {layer}, expert {expert}); layers are 0 to "
                        f"{self.num_layers - 1}, experts 0 to {self.num_experts - 1}"
                    )
                if (layer, expert) in held:
                    raise PlacementError(f"worker {name!r}: holds (layer {layer}, expert {expert}) twice")
                held.add((layer, expert))
        if not partial:
            self._refuse_uncovered()

    def _refuse_uncovered(self) -> None:
        uncovered = np.argwhere((self.holder_table < 0).all(axis=2)).tolist()
        if uncovered:
            raise PlacementError(
                f"{len(uncovered)} (layer, expert) held by no worker, the first: {tuple(uncovered[0])}"
            )

    def is_covered_without(self, lost: Collection[Member]) -> bool:
        """Whether every expert is held by a worker that is not among `lost`."""
        alive = np.array([worker.member not in lost for worker in self.workers] + [False])  # -1: no holder
        return bool(alive[self.holder_table].any(axis=2).all())

    @cached_property
    def holder_table(self) -> NDArray[np.int64]:
        """[num_layers, num_experts, most replicas]: holders in ascending order, then -1."""
        holders: dict[tuple[int, int], list[int]] = {}
        for index, worker in enumerate(self.workers):
            for slot in worker.experts:
                holders.setdefault(slot, []).append(index)
        replicas_max = max(map(len, holders.values()), default=1)
        table = np.full((self.num_layers, self.num_experts, replicas_max), -1, dtype=np.int64)
        for (layer, expert), workers in holders.items():
            table[layer, expert, : len(workers)] = workers
        table.flags.writeable = False
        return table


def spread(
    epoch: EpochId,
    fingerprint: str,
    members: Sequence[tuple[Member, str]],
    num_layers: int,
    num_experts: int,
    replicas: int,
) -> Placement:
    """A first placement before any load is known: every expert `replicas` times, dealt like cards.

    `members` are (member, address). Dealing in turn keeps the replicas of one expert on distinct workers,
    and slots per worker equal to within one: in every layer, and in total.
    """
    if not 1 <= replicas <= len(members):
        raise PlacementError(f"replicas: {replicas}; must be 1 to {len(members)}, the number of workers")
    hands: list[list[tuple[int, int]]] = [[] for _ in members]
    for card in range(num_layers * num_experts * replicas):
        hands[card % len(members)].append(divmod(card // replicas, num_experts))
    workers = tuple(
        PlacedWorker(member, address, tuple(hand)) for (member, address), hand in zip(members, hands, strict=True)
    )
    placement = Placement(epoch, fingerprint, num_layers, num_experts, workers)
    placement.validate()
    return placement

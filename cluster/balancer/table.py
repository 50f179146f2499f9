"""All layers and every worker's slots: what a placement is while it is being worked out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.balancer.layer import Flags, Layer, Loads, Step
from router.errors import PlacementError
from router.placement import EpochId, Member, PlacedWorker, Placement


@dataclass(frozen=True)
class Room:
    """An expert worker that may hold experts."""

    member: Member
    address: str
    host: str
    slots: int  # experts of all layers it may hold


def even_slots(num_layers: int, num_experts: int, replicas: int, workers: int, spare: int = 0) -> int:
    """Slots of each of `workers` when all experts are held `replicas` times, and `spare` more in each layer."""
    return -(-num_layers * num_experts * min(replicas, workers) // workers) + spare * num_layers


class Table:
    def __init__(
        self, rooms: Sequence[Room], load: Loads, replicas: int, current: Placement | None, together: Loads | None
    ) -> None:
        """load [L, E], together [L, E, E]. What `current` says of workers that have a room is kept."""
        num_layers, num_experts = load.shape
        if sum(room.slots for room in rooms) < num_layers * num_experts:
            raise PlacementError(
                f"slots: {sum(room.slots for room in rooms)} on {len(rooms)} expert worker(s); accepted: at least "
                f"{num_layers * num_experts}, one for each expert of each layer"
            )
        self.rooms = rooms
        self.replicas = min(replicas, len(rooms))
        names = sorted({room.host for room in rooms})
        self.hosts = np.array([names.index(room.host) for room in rooms])
        self.num_hosts = len(names)
        self.on_host = self.hosts[:, None] == np.arange(len(names))  # [W, hosts]
        self.slots = np.array([room.slots for room in rooms])
        self.share = -(-self.slots // num_layers)  # [W]: of one layer, if all were alike
        self.held = _held(rooms, current, (num_layers, num_experts))  # [L, E, W]
        self.had = self.held.copy()
        self.used: NDArray[np.int64] = self.held.sum(axis=(0, 1))
        known = {worker.member for worker in current.workers} if current else set()
        self.is_new = np.array([room.member not in known for room in rooms])  # [W]
        self.layers = [  # each sees its part of `held`
            Layer(
                load[i],
                self.held[i],
                self.had[i],
                self.hosts,
                self.replicas,
                None if together is None else together[i],
            )
            for i in range(num_layers)
        ]

    @property
    def has_room(self) -> Flags:
        """[W]"""
        return self.used < self.slots

    @property
    def busiest(self) -> float:
        """Sum over layers of the busiest worker's load: layers run one after the other."""
        return sum(layer.busiest for layer in self.layers)

    @property
    def mean(self) -> float:
        return sum(layer.mean for layer in self.layers)

    def apply(self, layer: int, step: Step, amounts: Loads | None = None) -> None:
        """amounts [E, W]: what it leads to, where that is known."""
        self.layers[layer].apply(step, amounts)
        self.used[step.target] += step.other < 0 and step.given_up < 0
        self.used[step.source] -= step.other < 0 and not step.stays

    def replace(self, layer: int, held: Flags) -> None:
        """held [E, W] instead of what this layer has."""
        self.used += held.sum(axis=0) - self.layers[layer].held.sum(axis=0)
        self.layers[layer].held[...] = held
        self.layers[layer].refresh()

    def replace_all(self, held: Flags) -> None:
        """held [L, E, W] instead of what there is."""
        for index, layer in enumerate(held):
            self.replace(index, layer)

    def drop(self, layer: int, expert: int, worker: int) -> None:
        self.layers[layer].held[expert, worker] = False
        self.layers[layer].refresh()
        self.used[worker] -= 1

    def surplus(self, worker: int) -> list[tuple[int, int]]:
        """(layer, expert) that it holds beside as many others as there should be, on as many hosts; those it is
        least asked for first."""
        found = []
        for index, layer in enumerate(self.layers):
            mine = np.flatnonzero(layer.held[:, worker] & (layer.held.sum(axis=1) > self.replicas))
            found += [
                (float(layer.amounts[expert, worker]), index, expert)
                for expert in mine.tolist()
                if layer.is_spread_without(expert, worker)
            ]
        return [(index, expert) for _, index, expert in sorted(found)]

    def placement(self, epoch: EpochId, fingerprint: str, current: Placement | None) -> Placement:
        """Slots that stay are named in the order they had."""
        before = {worker.member: worker.experts for worker in current.workers} if current else {}
        num_layers, num_experts, _ = self.held.shape
        workers = []
        for index, room in enumerate(self.rooms):
            now = {(layer, expert) for layer, expert in np.argwhere(self.held[:, :, index]).tolist()}
            kept = [pair for pair in before.get(room.member, ()) if pair in now]
            workers.append(PlacedWorker(room.member, room.address, (*kept, *sorted(now.difference(kept)))))
        placement = Placement(epoch, fingerprint, num_layers, num_experts, tuple(workers))
        placement.validate()
        return placement


def _held(rooms: Sequence[Room], current: Placement | None, shape: tuple[int, int]) -> Flags:
    """[L, E, W]"""
    held = np.zeros((*shape, len(rooms)), dtype=np.bool_)
    index = {room.member: i for i, room in enumerate(rooms)}
    for worker in current.workers if current else ():
        if worker.member in index and worker.experts:
            layers, experts = np.array(worker.experts).T
            held[layers, experts, index[worker.member]] = True
    return held

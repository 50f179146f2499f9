"""Pools that grow and shrink: what may be asked of them, who comes and who goes, and when. Pure.

The sizes are the roster's: whoever is wanted there. A worker that is to leave goes on until nobody needs it: an
expert worker until no attention worker can use an epoch that has it, an attention worker until it says that the
scheduler gives it nothing more and all it had has arrived. Nothing here has a deadline: that would drop a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.epochs import Epochs
from cluster.events import Command, Drain, Remember, Resize, Role
from cluster.roster import Roster, Worker
from router.placement import EpochId

VERSION_BITS = 20  # of a record, for the count within one term
WORKERS_MAX = 256  # of one pool, as in the configuration
MEMORY_GAUGE = "memory_available_bytes"  # of an expert worker's device
FIELDS = {Role.ATTENTION: "attention", Role.EXPERT: "experts"}


@dataclass(frozen=True)
class Refused:
    """A request that changes nothing."""

    field: str
    value: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.field} is {self.value}; accepted: {self.accepted}"


class Scaling:
    def __init__(self, roster: Roster, epochs: Epochs, term: int) -> None:
        self._roster, self._epochs = roster, epochs
        self._remembered = roster.pools
        self._version = term << VERSION_BITS
        self.failed = ""
        """Why the pools were not made as was last wanted."""

    def refusal(self, asked: Resize | Drain) -> Refused | None:
        """Why it cannot be; None: it can, as far as is known beforehand."""
        return _refusal(asked, self._roster, self._epochs)

    def follow(self, asked: Resize | Drain, now_s: float) -> list[Command]:
        """Asked again, nothing changes."""
        self.failed = ""
        roster = self._roster
        if isinstance(asked, Drain):
            worker = roster.workers[asked.worker]
            return roster.let_go(worker) if worker.is_wanted else []
        commands: list[Command] = []
        for role, size in ((Role.ATTENTION, asked.attention), (Role.EXPERT, asked.experts)):
            while size is not None and len(roster.wanted(role)) < size:
                roster.grow(role, now_s)
            while size is not None and len(roster.wanted(role)) > size:
                commands += roster.let_go(roster.shrink(role))
        return commands

    def give_up(self, worker: Worker, epoch: EpochId, why: str) -> None:
        """The placement being prepared cannot be held: who was to leave stays, for nobody can take its experts."""
        if not self._epochs.give_up(epoch):
            return
        worker.owes = None
        self.failed = f"{worker.id}: {why}"
        for leaver in self._roster.leavers(Role.EXPERT):
            leaver.is_wanted = True

    def dismiss(self, now_s: float) -> list[Command]:
        """Who is not wanted, and not needed either."""
        commands: list[Command] = []
        for worker in self._roster.leavers(Role.EXPERT):
            if not self._epochs.needs(worker.member):
                commands += self._roster.dismiss(worker, now_s)
        for worker in self._roster.leavers(Role.ATTENTION):
            if worker.health.is_drained or worker.epoch is None:  # None: never served in this life
                commands += self._roster.dismiss(worker, now_s)
        return commands

    def remember(self) -> list[Command]:
        """What the next term has to know, when it has changed."""
        pools = self._roster.pools
        if pools == self._remembered:
            return []
        self._remembered = pools
        self._version += 1
        return [Remember(self._version, pools)]


def _refusal(asked: Resize | Drain, roster: Roster, epochs: Epochs) -> Refused | None:
    if isinstance(asked, Drain):
        return _refused_drain(asked.worker, roster, epochs)
    sizes = {Role.ATTENTION: asked.attention, Role.EXPERT: asked.experts}
    for role, size in sizes.items():
        least = least_of(role, epochs)
        if size is not None and not least <= size <= WORKERS_MAX:
            return Refused(FIELDS[role], str(size), f"{_least_words(least, role)} to {WORKERS_MAX} workers")
    if asked.attention is None and asked.experts is None:
        return Refused("attention, experts", "nothing", "a number of workers for either, or for both")
    if asked.experts is not None:
        return _refused_for_memory(asked.experts, roster, epochs)
    return None


def least_of(role: Role, epochs: Epochs) -> int:
    """The replicas of an expert are on distinct workers."""
    return epochs.replicas if role is Role.EXPERT else 1


def _least_words(least: int, role: Role) -> str:
    return f"{least} (replicas)" if role is Role.EXPERT and least > 1 else str(least)


def _refused_drain(worker_id: str, roster: Roster, epochs: Epochs) -> Refused | None:
    worker = roster.workers.get(worker_id)
    ids = ", ".join(w.id for w in roster.workers.values() if w.is_wanted)
    if worker is None:
        return Refused("worker", repr(worker_id), f"one of {ids}")
    if not worker.is_wanted:
        return None  # it leaves already
    least, size = least_of(worker.role, epochs), len(roster.wanted(worker.role))
    if size <= least:
        return Refused(
            "worker", repr(worker_id), f"a worker of a pool of more than {_least_words(least, worker.role)}; "
            f"the {worker.role.value} pool has {size}: scale it up first",
        )  # fmt: skip
    return _refused_for_memory(size - 1, roster, epochs) if worker.role is Role.EXPERT else None


def _refused_for_memory(size: int, roster: Roster, epochs: Epochs) -> Refused | None:
    """Those that stay would have to hold what the others do. Judged by what is held now, where that is known, and
    not by more than is stored: a worker may choose to keep FP8. It looks again itself before it loads."""
    placed = {w.member: len(w.experts) for w in epochs.published.workers} if epochs.published else {}
    holders = [worker for worker in roster.wanted(Role.EXPERT) if worker.member in placed]
    num_slots = sum(placed[worker.member] for worker in holders)
    bytes_kept = sum(min(worker.health.bytes_kept, worker.health.bytes_loaded) for worker in holders)
    if size >= len(holders) or not bytes_kept or not num_slots:
        return None
    shape = epochs.shape
    slots_each = -(-shape.num_layers * shape.num_experts * min(epochs.replicas, size) // size)
    bytes_each = bytes_kept / num_slots
    needed: dict[str, float] = {}
    for worker in sorted(holders, key=lambda worker: -placed[worker.member])[:size]:
        place = _memory(worker)
        needed[place] = needed.get(place, 0.0) + max(0, slots_each - placed[worker.member]) * bytes_each
    free = {_memory(worker): worker.health.gauges.get(MEMORY_GAUGE) for worker in holders}
    for place, more in needed.items():
        available = free[place]
        if available is not None and more > available:
            return Refused(
                "experts", str(size), f"more: those that stay at {place} would need {more / 2**30:.2f} GiB more "
                f"memory for their experts, {available / 2**30:.2f} GiB are free",
            )  # fmt: skip
    return None


def _memory(worker: Worker) -> str:
    """Whose memory it takes: its host's, or its own GPU's."""
    register = worker.register
    if register is None or register.device.startswith("cpu"):
        return register.node if register else worker.id
    return worker.id

"""Which placement comes next: proposed, prepared by its expert workers, published, and its elders retired. Pure.

One placement is being prepared at a time, and one is published. What is being prepared is left to finish unless
one of its workers is lost, is to leave, or cannot hold it. Knows expert workers by where they are, and no life
cycles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.balancer.balancer import Balancer, Home, Proposal
from router.errors import PlacementError
from router.placement import EpochId, Member, Placement


@dataclass(frozen=True)
class ModelShape:
    """What a placement must cover, and for which checkpoint."""

    fingerprint: str
    num_layers: int
    num_experts: int  # of one layer


@dataclass
class Epochs:
    term: int
    shape: ModelShape
    balancer: Balancer
    number: int = 0  # of the newest epoch proposed in this term
    preparing: Placement | None = None
    published: Placement | None = None
    retired: EpochId | None = None
    _considered: tuple[tuple[tuple[Member, str], ...], bool] | None = None

    @property
    def replicas(self) -> int:
        """Holders of each expert, wherever there are as many workers."""
        return self.balancer.replicas

    @property
    def newest(self) -> Placement | None:
        return self.preparing or self.published

    def propose(self, here: Mapping[Member, Home], is_complete: bool) -> Placement | None:
        """The placement to prepare now; None when nothing is to change, or nothing can.

        `here`: live expert workers that are to stay, in a fixed order, and where they are. `is_complete`: all
        that are expected are here. With everyone here experts are arranged by the balancer, which gives a
        replacement its predecessor's slots and moves what newcomers and leavers make necessary; with someone
        missing the rest go on as soon as they cover the model. Otherwise: wait for who is to come. Where an epoch
        was begun in vain one follows, be it like the published one: its retirement frees what was loaded for the
        other.
        """
        if self.preparing and here.keys() >= _members(self.preparing):
            return None
        self.preparing = None
        considered = (tuple((member, home.address) for member, home in here.items()), is_complete)
        if considered == self._considered:
            return None  # asked at every event: the answer has not changed
        self._considered = considered
        wanted = self._everyone(here) if is_complete else self._survivors(here)
        if wanted is None or self._is_in_use(wanted):
            return None
        self.number += 1
        self.preparing = wanted
        return wanted

    def rebalance(self, proposal: Proposal) -> Placement | None:
        """The placement to prepare now: what is proposed, if what it set out from is still in use."""
        if self.preparing or self.published is None or proposal.before != self.published:
            return None
        self.number += 1
        self.preparing = replace(proposal.after, epoch=EpochId(self.term, self.number))
        return self.preparing

    def _everyone(self, here: Mapping[Member, Home]) -> Placement:
        """What must be, and no more: others may wait for it."""
        return self.balancer.task(self.shape.fingerprint, here, self.published, moves_max=0).solve(self._next)

    def _survivors(self, here: Mapping[Member, Home]) -> Placement | None:
        if self.published is None:
            return None
        workers = tuple(worker for worker in self.published.workers if worker.member in here)
        shape = self.shape
        survivors = Placement(self._next, shape.fingerprint, shape.num_layers, shape.num_experts, workers)
        try:
            survivors.validate()
        except PlacementError:
            return None  # some expert has no holder left: a replacement must load it first
        return survivors

    def _is_in_use(self, wanted: Placement) -> bool:
        """It is what is published, and no other has been begun since."""
        published = self.published
        return (
            published is not None and published.epoch.number == self.number and wanted.workers == published.workers
        )

    @property
    def _next(self) -> EpochId:
        return EpochId(self.term, self.number + 1)

    def give_up(self, epoch: EpochId) -> bool:
        """One of its workers cannot hold what is being prepared: nothing changes until the workers do."""
        if self.preparing is None or self.preparing.epoch != epoch:
            return False
        self.preparing = None
        return True

    def needs(self, member: Member) -> bool:
        """Whether some attention worker may still send this expert worker parcels, or soon will."""
        if self.published is None or self.retired != self._before(self.published.epoch):
            return True  # an older epoch may be in use
        return any(
            placed is not None and member in _members(placed) for placed in (self.published, self.preparing)
        )

    def publish(self, prepared: Mapping[Member, EpochId | None]) -> Placement | None:
        """Once every worker of the placement being prepared has prepared it: that placement, now published."""
        placement = self.preparing
        if placement is None or any(prepared.get(m) != placement.epoch for m in _members(placement)):
            return None
        self.published, self.preparing = placement, None
        return placement

    def retire(self, adopted: list[EpochId | None]) -> EpochId | None:
        """The newest epoch nobody uses any more, once: `adopted` is what every attention worker that may be
        alive uses. It and all older ones are stale."""
        if self.published is None or any(epoch != self.published.epoch for epoch in adopted):
            return None
        stale = self._before(self.published.epoch)
        if self.retired is not None and stale <= self.retired:
            return None
        self.retired = stale
        return stale

    @staticmethod
    def _before(epoch: EpochId) -> EpochId:
        return EpochId(epoch.term, epoch.number - 1)


def _members(placement: Placement) -> set[Member]:
    return {worker.member for worker in placement.workers}

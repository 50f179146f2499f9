"""What the controller is told, and what it answers: its only inputs and outputs.

Reports come from processes over their member streams, other events from the driver that runs workers, and
time from the pump. Orders go back over the streams, the other commands to the driver. All are immutable.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass

from cluster.balancer.balancer import Proposal
from router.membership import Adopted, Health, PeerLost, Prepared, Traced, Unprepared
from router.placement import EpochId, Member, Placement


class Role(enum.StrEnum):
    ATTENTION = "attention"
    EXPERT = "expert"
    SCHEDULER = "scheduler"
    GATEWAY = "gateway"


WORKER_ROLES = (Role.ATTENTION, Role.EXPERT)


@dataclass(frozen=True)
class Pools:
    """Which workers there should be, by id, and which are on their way out."""

    attention: tuple[str, ...]
    experts: tuple[str, ...]
    leaving: tuple[str, ...] = ()

    @classmethod
    def of_sizes(cls, attention: int, experts: int) -> Pools:
        """`attention-0`, `expert-0`, …"""
        return cls(
            tuple(f"{Role.ATTENTION.value}-{index}" for index in range(attention)),
            tuple(f"{Role.EXPERT.value}-{index}" for index in range(experts)),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Pools:
        return cls(**{name: tuple(ids) for name, ids in json.loads(text).items()})


@dataclass(frozen=True)
class Register:
    """The first report on every stream."""

    role: Role
    pid: int
    node: str
    device: str
    address: str  # expert worker: its exchange; gateway: its URL; scheduler: its service
    epoch: EpochId | None = None  # the placement it already uses, when the controller has restarted


ReportBody = Register | Health | Prepared | Unprepared | Adopted | PeerLost | Traced


@dataclass(frozen=True)
class Report:
    """Something a process says of itself or of what it sees."""

    sender: Member
    fingerprint: str
    term: int  # the newest controller term it has seen
    body: ReportBody


@dataclass(frozen=True)
class Left:
    """A member's stream has closed. It may come back: only its heartbeats decide whether it is lost."""

    member: Member


@dataclass(frozen=True)
class ActorDied:
    """The driver says that this worker's process has ended, or could not be started."""

    member: Member
    detail: str


@dataclass(frozen=True)
class Resize:
    """A person or the autoscaler wants pools of so many workers; None: as they are."""

    attention: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class Drain:
    """This worker is to leave, and its pool to be one smaller."""

    worker: str


@dataclass(frozen=True)
class Rebalance:
    """A person or the autoscaler wants experts where the balancer would have them."""

    proposal: Proposal


@dataclass(frozen=True)
class StopAll:
    """Drain: gateways first, then everything else."""


@dataclass(frozen=True)
class Tick:
    """Time has passed; everything that came before it has been told."""


Event = Report | Left | ActorDied | Resize | Drain | Rebalance | StopAll | Tick


@dataclass(frozen=True)
class Prepare:
    """Expert worker: load what this placement gives you, then report Prepared."""

    placement: Placement
    unhurried: bool = False  # nothing waits for it: loaded at a bounded rate


@dataclass(frozen=True)
class Publish:
    """Attention worker: connect, use it from the next step on, then report Adopted."""

    placement: Placement


@dataclass(frozen=True)
class Retire:
    """Expert worker: free what only this epoch and older ones held."""

    epoch: EpochId


@dataclass(frozen=True)
class Members:
    """Scheduler and gateways: the attention workers that are not lost."""

    attention: tuple[Member, ...]
    pid: int = 0  # of the controller that says so: the scheduler watches it
    node: str = ""
    draining: tuple[Member, ...] = ()
    """Those of `attention` that the scheduler is to empty: `Health.is_drained` says when one is."""


@dataclass(frozen=True)
class Exit:
    """End this process: a gateway drains first."""

    reason: str


@dataclass(frozen=True)
class SendTrace:
    """Attention worker: report Traced, of the last `seconds`. Asked by the shell for a person: decides nothing."""

    number: int
    seconds: float
    bytes_max: int


OrderBody = Prepare | Publish | Retire | Members | Exit | SendTrace


@dataclass(frozen=True)
class Order:
    """An order as it travels: obeyed only when no newer term has been seen."""

    term: int
    fingerprint: str
    body: OrderBody


@dataclass(frozen=True)
class Send:
    """Command: put this order on the member's stream; lost without harm when it has none."""

    to: Member
    body: OrderBody


@dataclass(frozen=True)
class StartWorker:
    """Command: start this life of a worker, unless its number has been taken; report ActorDied at its end."""

    role: Role
    member: Member


@dataclass(frozen=True)
class WatchWorker:
    """Command: an earlier controller started it; report ActorDied at its end, or at once if it is gone."""

    member: Member


@dataclass(frozen=True)
class KillWorker:
    """Command: make sure that this life is over. `pid` 0: it never registered."""

    member: Member
    pid: int
    node: str
    reason: str


@dataclass(frozen=True)
class Remember:
    """Command: give this to the next term's controller."""

    version: int  # grows, also from term to term
    pools: Pools


Command = Send | StartWorker | WatchWorker | KillWorker | Remember

"""What a worker tells the controller that orders it: how it is, and what has happened.

Torch-free and Ray-free, so that both pools and the controller share it. A worker's service calls its
`on_event` with one of the events; `health()` is asked once a heartbeat and must return at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.placement import EpochId, Member


class HealthState(enum.StrEnum):
    """What a process says of itself; what the controller makes of it is in `cluster/lifecycle.py`."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class ExpertLoad:
    """What an expert worker was asked for, in all its life: one entry for each expert that ever was."""

    slots: tuple[int, ...] = ()  # layer * num_experts + expert
    reads: tuple[int, ...] = ()  # computations that read the expert's weights
    rows: tuple[int, ...] = ()  # rows that these had for it


@dataclass(frozen=True)
class Health:
    """How a process is, sent with every heartbeat."""

    state: HealthState
    bytes_loaded: int = 0
    bytes_total: int = 0  # 0: not known yet
    detail: str = ""  # what it is doing, or why it failed
    gauges: Mapping[str, float] = field(default_factory=dict)  # for status and metrics, no history
    bytes_kept: int = 0  # of weights in memory; bytes_loaded counts them as stored
    kept_as: str = ""  # their dtypes in memory: "bfloat16", "fp8", "bfloat16 and fp8"
    links: Mapping[str, str] = field(default_factory=dict)  # attention: expert worker to the link's transport
    load: ExpertLoad = ExpertLoad()  # expert

    @property
    def is_drained(self) -> bool:
        """Attention worker: nothing more comes, says the scheduler, and all it had has ended and arrived."""
        return self.state is HealthState.DRAINING and self.gauges.get("sequences_open") == 0


@dataclass(frozen=True)
class Prepared:
    """Expert worker: every slot this epoch gives it is loaded. Said again when asked again."""

    epoch: EpochId


@dataclass(frozen=True)
class Unprepared:
    """Expert worker: it cannot hold what this epoch gives it, and why. It goes on with what it holds."""

    epoch: EpochId
    why: str


@dataclass(frozen=True)
class Adopted:
    """Attention worker: used from its next step on. Said again when asked again."""

    epoch: EpochId


@dataclass(frozen=True)
class PeerLost:
    """Attention worker: the link to this expert worker broke."""

    member: Member


@dataclass(frozen=True)
class Failed:
    """The worker cannot go on, and why, in words for the person who started it."""

    detail: str


@dataclass(frozen=True)
class Traced:
    """Attention worker: what its step trace holds, as it was ordered to say."""

    number: int  # of the order
    trace: bytes


MemberEvent = Prepared | Unprepared | Adopted | PeerLost | Traced | Failed

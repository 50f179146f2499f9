"""What a bad network does to the messages of a link: decided from a seed, whatever the time. Pure.

Exchange i of a link is the i-th parcel that an end sees, with the reply to it: after a loss or a duplicate the two
ends count differently. Its fate is a hash of (seed, link, i), so two runs that send the same parcels meet the same
faults, and a test that failed fails again. When a message arrives follows from its fate and from what went over
the wire before; the time is an argument, real or a simulator's.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, fields

from router.placement import Member

_DRAWS = struct.Struct("<8Q")


@dataclass(frozen=True)
class Faults:
    """How bad. By default nothing is: no fault, and a link without length or width."""

    seed: int = 0
    loss: float = 0.0
    """Probability that a parcel never arrives, and as much that its reply does not."""

    duplicate: float = 0.0
    """Probability that a parcel arrives twice, and is answered twice."""

    reorder: float = 0.0
    """Probability of each message that those behind may overtake it, for it takes `reorder_s` longer."""

    reorder_s: float = 0.01

    death: float = 0.0
    """Probability of each parcel that the expert worker dies when it arrives, to all its peers."""

    delay_s: float = 0.0
    """Each message takes up to so much longer. Those behind it wait, unless they may overtake it."""

    latency_s: float = 0.0
    """From one end of the wire to the other, each way."""

    bytes_per_s: float = math.inf
    """A message occupies its wire, one way of one link, for its bytes divided by this."""

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder", "death"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)}; must be 0 to 1")
        for name in ("reorder_s", "delay_s", "latency_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; must be 0 or more seconds")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s: {self.bytes_per_s}; must be above 0")

    @classmethod
    def parse(cls, text: str) -> Faults:
        """From `name=value,name=value`; what is not named keeps its default. Raises ValueError."""
        accepted = {field.name: int if field.name == "seed" else float for field in fields(cls)}
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in accepted:
                raise ValueError(f"faults: {part!r}; must be name=value, the name one of {', '.join(accepted)}")
            try:
                values[name] = accepted[name](value)
            except ValueError:
                raise ValueError(f"faults: {name}: {value!r}; must be a number") from None
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Leg:
    """One message's way over one wire."""

    is_lost: bool
    may_be_overtaken: bool
    delay_s: float  # beyond what the wire takes


@dataclass(frozen=True)
class Fate:
    """Of one exchange: parcel out, reply back."""

    out: Leg
    back: Leg
    is_duplicated: bool  # the parcel
    is_deadly: bool  # the parcel, to who receives it


def fate(faults: Faults, sender: Member, to: Member, number: int) -> Fate:
    """Of exchange `number` of the link between these two lives."""
    name = f"{faults.seed}/{sender.id}.{sender.incarnation}/{to.id}.{to.incarnation}/{number}"
    draws = [word / 2**64 for word in _DRAWS.unpack(hashlib.blake2b(name.encode()).digest())]
    return Fate(
        out=_leg(faults, *draws[0:3]),
        back=_leg(faults, *draws[3:6]),
        is_duplicated=draws[6] < faults.duplicate,
        is_deadly=draws[7] < faults.death,
    )


def _leg(faults: Faults, loss: float, reorder: float, delay: float) -> Leg:
    overtaken = reorder < faults.reorder
    return Leg(loss < faults.loss, overtaken, delay * faults.delay_s + (faults.reorder_s if overtaken else 0.0))


class Wire:
    """One way of one link: a queue in front, then a distance."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._free_s = -math.inf  # when the last message has left the queue
        self._newest_s = -math.inf  # when the last that may not be overtaken arrives

    def arrival_s(self, now_s: float, nbytes: int, leg: Leg) -> float:
        """When a message sent now will be there; never before `now_s`, and at `now_s` on a wire without length."""
        self._free_s = max(now_s, self._free_s) + nbytes / self._faults.bytes_per_s
        there_s = max(self._newest_s, self._free_s + self._faults.latency_s + leg.delay_s)
        if not leg.may_be_overtaken:
            self._newest_s = there_s
        return there_s

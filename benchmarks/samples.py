"""Repeated measurements, and what is said of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Samples:
    """In the unit of the values. Never a mean alone: on a shared machine one outlier would decide it."""

    count: int
    min: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        ordered = sorted(values)
        last = len(ordered) - 1
        p99 = ordered[-(-last * 99 // 100)]
        return cls(len(ordered), ordered[0], statistics.median(ordered), p99, ordered[-1])

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def ratio(over: Sequence[float], under: Sequence[float]) -> Samples:
    """Of measurements taken side by side, one pair a round: what slows both cancels."""
    return Samples.of([a / b for a, b in zip(over, under, strict=True)])

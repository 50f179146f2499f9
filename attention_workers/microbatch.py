"""Slices of a step, and the order of work over them as data, so that loop, capture and simulator agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from attention_workers.sequence import Span


@dataclass(frozen=True)
class Work:
    op: Literal["dispatch", "combine"]
    layer: int
    microbatch: int


def ping_pong(num_layers: int, num_microbatches: int) -> Iterator[Work]:
    """Each (layer, microbatch) dispatched once, then combined once; while one waits, the others attend."""
    for layer in range(num_layers):
        for microbatch in range(num_microbatches):
            if layer > 0:
                yield Work("combine", layer - 1, microbatch)
            yield Work("dispatch", layer, microbatch)
    for microbatch in range(num_microbatches):
        yield Work("combine", num_layers - 1, microbatch)


def split(spans: list[Span], num_microbatches: int) -> list[list[Span]]:
    """At most that many slices, whole sequences in each, rows as even as that allows; none empty."""
    slices: list[list[Span]] = [[] for _ in range(num_microbatches)]
    rows = [0] * num_microbatches
    for span in sorted(spans, key=lambda s: -s.count):
        least = rows.index(min(rows))
        slices[least].append(span)
        rows[least] += span.count
    return [s for s in slices if s]

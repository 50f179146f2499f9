"""What bounds the exchange of parcels: every wait, queue and retry has its name here.

Every process of a cluster reads it, also those that hold no tensors: nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

RowsSent = Literal["plain", "fp8"]
Replies = Literal["rows", "sums"]
"""What travels each way between the pools (router.rows)."""

FRAME_OVERHEAD_BYTES = 256  # a frame's header, padding and alignment never cost more
PAGE_BYTES = 4096


@dataclass(frozen=True)
class RouterConfig:
    combine_timeout_s: float = 2.0
    """A peer that owes a reply and is silent for so long counts as lost: shorter finds a hung worker sooner.
    A worker at work is never silent for so long: it pulses between experts, four times in this."""

    combine_total_s: float = 60.0
    """Longest wait for the replies of one dispatch, whoever pulses. Must exceed the slowest honest batch."""

    connect_timeout_s: float = 2.0
    """Longest wait for all handshakes of one placement together, and of one stranger at an expert's door.
    Nobody's step waits for them."""

    replans_max: int = 4
    """How many times the rows of one dispatch may be planned again after losses and refusals."""

    overload_pause_s: float = 0.001
    """Pause before rows that found their peer full are planned again, on a replica if there is one; doubles with
    each further attempt."""

    stay_awake_s: float = 1e-4
    """How long who waits for parcels or replies stays awake before it sleeps, giving its core to others meanwhile:
    a small parcel then finds no core asleep. Seldom tried where it is in vain (decision 13); 0: never."""

    parcels_in_flight_max: int = 16
    """Unanswered parcels on one link: first plan and one replan of every microbatch."""

    link_bytes_max: int = 16 << 20
    """Shared memory of one direction of one link, in bytes, a multiple of 4096: see `link_bytes_needed`.
    At most half of it is occupied, and only what was once occupied is resident."""

    rows_max: int = 1024
    """Most rows (tokens) in one dispatch, hence in one parcel."""

    experts_per_row_max: int = 16
    """Most experts one row may go to (the model's top-k)."""

    keepalive_s: float = 5.0
    """Between hosts, an idle link is asked for a sign of life so often (a second at least); silent for as long
    again, it is lost."""

    peers_max: int = 64
    """Most attention workers linked, and as many greeting, at one expert worker."""

    dispatch_rows: Literal["auto", "plain", "fp8"] = "auto"
    """How rows go to the experts. fp8: codes with a scale for each 128, half of bfloat16's bytes; not in exact
    numerics. auto: plain, which coding on a CPU never beat."""

    replies: Literal["auto", "rows", "sums"] = "auto"
    """What experts send back: a row for each route, or for each row of the parcel its weighted sum; those not in
    exact numerics. auto: sums where numerics are fast."""

    gpu_pairs_max: int = 15
    """Most pairs whose rows go from GPU to GPU, at one worker. Each costs memory: by cuda_ipc a ring of
    `link_bytes_max`, by nccl two communicators. More than 15 pairs of nccl would have more streams than a GPU has
    hardware queues, and could wait for one another for ever (decision 11)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            may_be_zero = field.name in ("replans_max", "overload_pause_s", "stay_awake_s")
            least = 0 if may_be_zero else 1 if isinstance(value, int) else 1e-3
            if not least <= value < math.inf:
                raise ValueError(f"{field.name}: {value}; must be at least {least:g}")
        if self.combine_total_s < self.combine_timeout_s:
            raise ValueError(
                f"combine_total_s: {self.combine_total_s:g}; must be at least combine_timeout_s, "
                f"{self.combine_timeout_s:g}"
            )
        if self.link_bytes_max % PAGE_BYTES:
            raise ValueError(f"link_bytes_max: {self.link_bytes_max}; must be a multiple of {PAGE_BYTES}")

    def fitted(self, experts_per_row: int, hidden: int, element_bytes: int) -> RouterConfig:
        """With links wide enough for a full step of this model, all of whose experts are on one worker."""
        needed = link_bytes_needed(
            self.rows_max, experts_per_row, hidden, element_bytes, self.parcels_in_flight_max
        )
        return replace(self, link_bytes_max=max(self.link_bytes_max, needed))

    def rows_sent(self, numerics: str) -> RowsSent:
        """Raises ValueError where exactness forbids what is asked."""
        if self.dispatch_rows == "fp8" and numerics == "exact":
            raise ValueError(
                "router.dispatch_rows: 'fp8' with numerics 'exact'; must be auto or plain, or numerics 'fast'"
            )
        return "plain" if self.dispatch_rows == "auto" else self.dispatch_rows

    def answers(self, numerics: str) -> Replies:
        """As above."""
        if self.replies == "sums" and numerics == "exact":
            raise ValueError(
                "router.replies: 'sums' with numerics 'exact'; must be auto or rows, or numerics 'fast'"
            )
        if self.replies == "auto":
            return "rows" if numerics == "exact" else "sums"
        return self.replies

    @property
    def routes_max(self) -> int:
        """Most routes in one parcel."""
        return self.rows_max * self.experts_per_row_max


def link_bytes_needed(rows: int, experts_per_row: int, hidden: int, element_bytes: int, parcels: int) -> int:
    """The least `link_bytes_max` for `rows` tokens in flight, all of whose experts are on one worker.

    Replies are the larger direction (a row per route), and a ring is filled at most half (shm_ring).
    """
    occupied = rows * experts_per_row * hidden * element_bytes + parcels * FRAME_OVERHEAD_BYTES
    return -(-2 * occupied // PAGE_BYTES) * PAGE_BYTES

"""The way of rows between two GPUs, beside the frames of one link.

Headers, routes, refusals and pulses travel as ever, in shared memory or over gRPC; only the rows of a link with a
lane go from GPU to GPU. A lane gives the link the regions in which frames are written and read: their rows lie on
the device. What it needs to agree on goes as bytes with the hello and the welcome. One thread at a time.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Protocol

from router.config import RouterConfig
from router.errors import LinkRefused
from router.transport.frame import FrameLimits, Region
from router.transport.watch import Watch

KEY_BYTES_MAX = 1024  # what a lane adds to a hello or a welcome


class Lane(ABC):
    kind: str
    key = b""  # for the peer: goes with the hello, or else with the welcome
    posted = 0  # receives begun, ever
    arrived = 0  # of them done, in order: rows that may be read
    held_bytes = 0  # of device memory in which rows were received and not let go, where the link does not count

    def complete(self, key: bytes) -> None:  # noqa: B027
        """The welcome has come with the peer's key. Raises LinkRefused. Does not wait."""

    def is_open(self) -> bool:
        """Whether rows can travel yet. Raises TransportError when they can no longer, or never will."""
        return True

    @property
    def bell(self) -> int | None:
        """A descriptor to be read that rings when the lane has opened or failed, or rows have arrived."""
        return None

    def join(self, watch: Watch) -> None:  # noqa: B027
        """Have `watch` wake when the bell rings. Once."""

    @abstractmethod
    def incoming(self, buffer: memoryview, limits: FrameLimits) -> Region:
        """Where frames from the peer are read. Asking it for the rows of a frame begins to receive them."""

    @abstractmethod
    def outgoing(self, buffer: memoryview, limits: FrameLimits) -> Region:
        """Where frames to the peer are written. Rows put there have been sent when the frame may be published."""

    def done_reading(self, nbytes: int) -> None:  # noqa: B027
        """Rows of so many bytes are read no more, as far as this thread has asked the device; before a frame is
        given back to the peer."""

    @abstractmethod
    def close(self, *, peer_has_left: bool = False) -> None:
        """Let go at once, whatever the peer does. Idempotent. `peer_has_left`: it has let go already."""


class Lanes(Protocol):
    """How lanes of one kind are made, for all links of an end. Bounded by `gpu_pairs_max`."""

    kind: str

    def offer(self, ring_bytes: int) -> Lane:
        """For a hello. Raises LinkRefused."""

    def accept(self, key: bytes, ring_bytes: int) -> Lane:
        """For a hello that came with this key and was found good. Raises LinkRefused."""

    def close(self) -> None:
        """When all lanes are closed. Waits, for a bounded time, until nothing is left of them. Idempotent."""


class Pairs:
    """How many pairs a worker serves at once, by lanes of any kind: each costs memory, with NCCL hardware queues.
    From any thread."""

    def __init__(self, config: RouterConfig) -> None:
        self._max = config.gpu_pairs_max
        self._taken = 0
        self._guard = threading.Lock()

    def take(self) -> None:
        with self._guard:
            if self._taken >= self._max:
                raise LinkRefused(
                    f"pairs: this GPU serves {self._taken} already; at most {self._max} (gpu_pairs_max)"
                )
            self._taken += 1

    def give_back(self) -> None:
        with self._guard:
            self._taken -= 1

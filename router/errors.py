"""The router's error tree, drawn once.

RouterError
├── PlacementError        a placement that contradicts itself, or is older than the one in use
├── ExpertsUnavailable    nobody will compute them now: wait for a better placement, or give the step up
├── ParcelMalformed       a peer or a link could not read our parcel: a bug, never retried
├── GpuUnavailable        rows cannot travel between GPUs here: what is missing
├── GpuError              a call to CUDA or NCCL failed
└── TransportError        one link, not the whole exchange
    ├── FrameError        bytes that are no frame of this link
    ├── RingError         counters in shared memory that cannot be
    ├── LinkRefused       the handshake ended without a welcome: says why
    ├── PeerGone          its socket or stream has ended, as by its death; all else above it broke a rule
    └── EndClosed         used after `close`
"""

from __future__ import annotations


class RouterError(Exception):
    """Anything the router reports."""


class PlacementError(RouterError):
    pass


class ExpertsUnavailable(RouterError):
    def __init__(self, layer: int, experts: frozenset[int], why: str) -> None:
        super().__init__(f"layer {layer}: experts {sorted(experts)}: {why}")
        self.layer = layer
        self.experts = experts


class ParcelMalformed(RouterError):
    pass


class GpuUnavailable(RouterError):
    pass


class GpuError(RouterError):
    pass


class TransportError(RouterError):
    pass


class FrameError(TransportError):
    pass


class RingError(TransportError):
    pass


class LinkRefused(TransportError):
    pass


class PeerGone(TransportError):
    pass


class EndClosed(TransportError):
    pass

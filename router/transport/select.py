"""Which transport: the one place that knows them all."""

from __future__ import annotations

from typing import NamedTuple

from router.config import RouterConfig
from router.errors import TransportError
from router.transport.attention_end import LinkedAttentionEnd
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.cuda import GPU_KINDS, Gpu
from router.transport.expert_end import LinkedExpertEnd
from router.transport.faults import Faults
from router.transport.faulty import FaultyAttentionEnd, FaultyExpertEnd
from router.transport.grpc_dialer import GrpcDialer
from router.transport.grpc_door import GrpcDoor
from router.transport.lane import Lanes, Pairs
from router.transport.link import HOST, Door
from router.transport.local import LocalAttentionEnd, LocalExpertEnd, LocalHub
from router.transport.mirror_lane import MirrorLanes
from router.transport.pair_lane import PairLanes
from router.transport.shm_door import ShmDoor
from router.transport.shm_handshake import ShmDialer

KINDS = ("local", "auto", "shm", "grpc", "nccl", "cuda_ipc", "faulty:KIND")
"""auto: each expert worker listens in two ways, and each pair uses the first that reaches. Where rows lie on GPUs
cuda_ipc on one host, else nccl; where they lie on the host shm, else grpc.
faulty:KIND or faulty:KIND:name=value,...: any other, over a network as bad or slow as said (faults.py)."""

_FAULTY = "faulty:"
_LOOPBACK = "127.0.0.1"


class _Way(NamedTuple):
    """How one door is reached: what carries the frames, and what the rows, if not the frames themselves."""

    is_shm: bool
    lanes: Lanes | None


def attention_end(
    kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None, gpu: Gpu | None = None
) -> AttentionEnd:
    """`hub`: for "local" alone, shared by all ends that may meet. `gpu`: where rows lie (see `gpu_for`)."""
    if kind.startswith(_FAULTY):
        wrapped, faults = _parted(kind)
        return FaultyAttentionEnd(attention_end(wrapped, identity, config, hub, gpu), identity, faults)
    if kind == "local":
        return LocalAttentionEnd(_required(hub), identity, config)
    dialers = [
        ShmDialer(identity, config, lanes) if is_shm else GrpcDialer(identity, config, lanes)
        for is_shm, lanes in _ways(kind, identity, config, gpu)
    ]
    return LinkedAttentionEnd(
        identity, config, dialers, gpu.device if gpu and kind not in ("shm", "grpc") else HOST
    )


def expert_end(
    kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None, host: str = _LOOPBACK,
    gpu: Gpu | None = None,
) -> ExpertEnd:  # fmt: skip
    """`hub`, `gpu`: as above. `host`: what grpc listens on and its address says; others must reach it there."""
    if kind.startswith(_FAULTY):
        wrapped, faults = _parted(kind)
        return FaultyExpertEnd(expert_end(wrapped, identity, config, hub, host, gpu), identity, config, faults)
    if kind == "local":
        return LocalExpertEnd(_required(hub), identity, config)
    doors: list[Door] = []
    try:
        for is_shm, lanes in _ways(kind, identity, config, gpu):
            doors.append(ShmDoor(identity, config, lanes) if is_shm else GrpcDoor(identity, config, host, lanes))
    except TransportError:
        for door in doors:
            door.close()
            door.let_go()
        raise
    return LinkedExpertEnd(identity, config, doors, gpu.device if gpu and kind not in ("shm", "grpc") else HOST)


def _parted(kind: str) -> tuple[str, Faults]:
    wrapped, _, faults = kind.removeprefix(_FAULTY).partition(":")
    return wrapped, Faults.parse(faults)


def _ways(kind: str, identity: LinkIdentity, config: RouterConfig, gpu: Gpu | None) -> list[_Way]:
    """The preferred first."""
    if kind not in KINDS:
        raise ValueError(f"transport: {kind!r}; must be one of {', '.join(KINDS)}")
    if kind in GPU_KINDS and gpu is None:
        raise ValueError(f"gpu: none; the transport {kind!r} needs one that rows lie on")
    if gpu is None or kind in ("shm", "grpc"):
        return [_Way(is_shm, None) for is_shm in (True, False) if kind in ("auto", "shm" if is_shm else "grpc")]
    ways, pairs = [], Pairs(config)
    if kind in ("auto", "cuda_ipc"):
        ways.append(_Way(True, MirrorLanes(gpu, config, pairs)))
    if kind in ("auto", "nccl"):
        lanes = PairLanes(gpu, identity, config, pairs)
        ways += [_Way(True, lanes)] if kind == "nccl" else []
        ways.append(_Way(False, lanes))
    return ways


def _required(hub: LocalHub | None) -> LocalHub:
    if hub is None:
        raise ValueError("hub: none; the local transport needs one that its ends share")
    return hub

"""Which transport: the one place that knows them all."""

from __future__ import annotations

from router.config import RouterConfig
from router.transport.attention_end import LinkedAttentionEnd
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.expert_end import LinkedExpertEnd
from router.transport.faults import Faults
from router.transport.faulty import FaultyAttentionEnd, FaultyExpertEnd
from router.transport.grpc_dialer import GrpcDialer
from router.transport.grpc_door import GrpcDoor
from router.transport.local import LocalAttentionEnd, LocalExpertEnd, LocalHub
from router.transport.shm_door import ShmDoor
from router.transport.shm_handshake import ShmDialer

KINDS = ("local", "auto", "shm", "grpc", "faulty:KIND")
"""auto: each expert worker listens in both ways, and each pair uses shm if that reaches, else grpc.
faulty:KIND or faulty:KIND:name=value,...: any other, over a network as bad or slow as said (faults.py)."""

_FAULTY = "faulty:"
_LOOPBACK = "127.0.0.1"


def attention_end(
    kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None
) -> AttentionEnd:
    """`hub`: for "local" alone, shared by all ends that may meet."""
    if kind.startswith(_FAULTY):
        wrapped, faults = _parted(kind)
        return FaultyAttentionEnd(attention_end(wrapped, identity, config, hub), identity, faults)
    if kind == "local":
        return LocalAttentionEnd(_required(hub), identity, config)
    if kind == "auto":
        return LinkedAttentionEnd(identity, config, (ShmDialer(identity, config), GrpcDialer(identity, config)))
    if kind == "shm":
        return LinkedAttentionEnd(identity, config, (ShmDialer(identity, config),))
    if kind == "grpc":
        return LinkedAttentionEnd(identity, config, (GrpcDialer(identity, config),))
    raise _unknown(kind)


def expert_end(
    kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None, host: str = _LOOPBACK
) -> ExpertEnd:
    """`hub`: as above. `host`: what grpc listens on and its address says; other hosts must reach it there."""
    if kind.startswith(_FAULTY):
        wrapped, faults = _parted(kind)
        return FaultyExpertEnd(expert_end(wrapped, identity, config, hub, host), identity, config, faults)
    if kind == "local":
        return LocalExpertEnd(_required(hub), identity, config)
    if kind == "auto":
        doors = (ShmDoor(identity, config), GrpcDoor(identity, config, host))
        return LinkedExpertEnd(identity, config, doors)
    if kind == "shm":
        return LinkedExpertEnd(identity, config, (ShmDoor(identity, config),))
    if kind == "grpc":
        return LinkedExpertEnd(identity, config, (GrpcDoor(identity, config, host),))
    raise _unknown(kind)


def _parted(kind: str) -> tuple[str, Faults]:
    wrapped, _, faults = kind.removeprefix(_FAULTY).partition(":")
    return wrapped, Faults.parse(faults)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"transport: {kind!r}; must be one of {', '.join(KINDS)}")


def _required(hub: LocalHub | None) -> LocalHub:
    if hub is None:
        raise ValueError("hub: none; the local transport needs one that its ends share")
    return hub

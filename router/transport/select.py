"""Which transport: the one place that knows them all."""

from __future__ import annotations

from router.config import RouterConfig
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.local import LocalAttentionEnd, LocalExpertEnd, LocalHub
from router.transport.shm_attention import ShmAttentionEnd
from router.transport.shm_expert import ShmExpertEnd

KINDS = ("local", "shm")


def attention_end(
    kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None
) -> AttentionEnd:
    """`hub`: for "local" alone, shared by all ends that may meet."""
    if kind == "local":
        return LocalAttentionEnd(_required(hub), identity, config)
    if kind == "shm":
        return ShmAttentionEnd(identity, config)
    raise ValueError(f"transport: {kind!r}; must be one of {', '.join(KINDS)}")


def expert_end(kind: str, identity: LinkIdentity, config: RouterConfig, hub: LocalHub | None = None) -> ExpertEnd:
    """`hub`: for "local" alone, shared by all ends that may meet."""
    if kind == "local":
        return LocalExpertEnd(_required(hub), identity, config)
    if kind == "shm":
        return ShmExpertEnd(identity, config)
    raise ValueError(f"transport: {kind!r}; must be one of {', '.join(KINDS)}")


def _required(hub: LocalHub | None) -> LocalHub:
    if hub is None:
        raise ValueError("hub: none; the local transport needs one that its ends share")
    return hub

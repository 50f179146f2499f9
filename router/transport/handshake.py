"""What two ends must agree on before a link stands. Pure: says why not, moves no bytes."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass, field

from router.config import RouterConfig
from router.errors import LinkRefused
from router.placement import Member
from router.transport.base import LinkIdentity
from router.transport.frame import VERSION

_TOLD_MAX = 200  # characters of a stranger's word that we repeat


@dataclass(frozen=True)
class Hello:
    """The first words of the attention end."""

    version: int
    sender: Member
    to: Member
    fingerprint: str
    token: str = field(repr=False)
    hidden: int
    dtype: str
    rows: str  # plain or fp8: how they are sent
    replies: str  # rows or sums
    ring_bytes: int  # the link's bound of each direction; shm: the ring's size; else 0
    lane_key: bytes = b""  # of rows that go from GPU to GPU (lane.py)


@dataclass(frozen=True)
class Welcome:
    """The expert end's answer."""

    sender: Member
    refused: str  # why; empty: welcome
    lane_key: bytes = b""


def hello(identity: LinkIdentity, to: Member, ring_bytes: int = 0, lane_key: bytes = b"") -> Hello:
    return Hello(
        VERSION, identity.member, to, identity.fingerprint, identity.token, identity.hidden,
        dtype_name(identity), identity.rows, identity.replies, ring_bytes, lane_key,
    )  # fmt: skip


def why_refused(own: LinkIdentity, greeting: Hello, linked: Collection[Member], config: RouterConfig) -> str:
    """Why the expert end, which has links to `linked`, does not take this one; empty if it does.

    The token is judged first, in constant time, and until it is right nothing about this worker is said.
    """
    if not hmac.compare_digest(own.token.encode(), greeting.token.encode()):
        return "token: not this cluster's"
    for name, theirs, ours in (
        ("version", greeting.version, VERSION),
        ("incarnation", greeting.to, own.member),
        ("fingerprint", greeting.fingerprint, own.fingerprint),
        ("hidden", greeting.hidden, own.hidden),
        ("dtype", greeting.dtype, dtype_name(own)),
        ("rows", greeting.rows, own.rows),
        ("replies", greeting.replies, own.replies),
    ):
        if theirs != ours:
            return f"{name}: {str(theirs)[:_TOLD_MAX]}; must be {ours}"
    if greeting.ring_bytes > config.link_bytes_max:
        return f"ring_bytes: {greeting.ring_bytes}; at most {config.link_bytes_max} (link_bytes_max)"
    newest = max((member.incarnation for member in superseded(greeting.sender, linked)), default=0)
    if greeting.sender.incarnation < newest:
        return f"incarnation: {greeting.sender}; must be at least {newest}"
    if len(linked) >= config.peers_max and not newest:
        return f"peers: {len(linked)} attention workers are linked; at most {config.peers_max}"
    return ""


def refuse_unless_welcome(welcome: Welcome, expected: Member) -> None:
    """The attention end's judgement. Raises LinkRefused with the peer's reason."""
    if welcome.refused:
        raise LinkRefused(welcome.refused)
    if welcome.sender != expected:
        raise LinkRefused(f"incarnation: {welcome.sender} answers; must be {expected}")


def superseded(sender: Member, linked: Collection[Member]) -> list[Member]:
    """Earlier links of the same worker: they go when its new one stands."""
    return [member for member in linked if member.id == sender.id]


def dtype_name(identity: LinkIdentity) -> str:
    return str(identity.dtype).removeprefix("torch.")

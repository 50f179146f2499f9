"""How a shared-memory link comes to stand: one greeting, one answer, over an abstract Unix socket.

The attention end connects, sends LinkHello with three descriptors (segment, bell of the parcels, bell of the
replies), and is answered with LinkWelcome. The socket keeps message boundaries, so a hello is one bounded
receive and needs no length. An abstract name belongs to its sockets: any death leaves nothing behind. Both
sides ask the kernel for the other's user before they say anything. What was handed over is looked at before it is
used: a descriptor may be anything. Nothing here blocks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection

from router.config import RouterConfig
from router.errors import LinkRefused
from router.placement import Member
from router.transport.base import LinkIdentity, Peer
from router.transport.handshake import Welcome, hello, refuse_unless_welcome, why_refused
from router.transport.lane import Lane, Lanes
from router.transport.lane_greeting import LaneGreeting
from router.transport.link import AttentionLink, Greeting
from router.transport.shm_bell import check_bell, new_bell
from router.transport.shm_link import ShmAttentionLink, ShmExpertLink, Wiring
from router.transport.shm_ring import create_segment, map_segment
from router.transport.wire import (
    HELLO_BYTES_MAX,
    hello_from_bytes,
    hello_to_bytes,
    welcome_from_bytes,
    welcome_to_bytes,
)

SCHEME = "unix-abstract:"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_DESCRIPTORS = 3  # segment, bell of the parcels, bell of the replies


def scheme(lanes: Lanes | None) -> str:
    """What addresses begin with where rows travel by such lanes; None: in the rings."""
    return f"{lanes.kind}+{SCHEME}" if lanes else SCHEME


def listen(identity: LinkIdentity, config: RouterConfig, lanes: Lanes | None = None) -> tuple[socket.socket, str]:
    """A listening socket of a fresh name, and its address."""
    name = f"expertmesh/{identity.member.id}.{identity.member.incarnation}/{os.urandom(8).hex()}"
    listener = _new_socket()
    listener.bind(f"\0{name}")
    listener.listen(config.peers_max)
    return listener, scheme(lanes) + name


class ShmDialer:
    """Reaches experts on this host; elsewhere nobody listens at such a name."""

    def __init__(self, identity: LinkIdentity, config: RouterConfig, lanes: Lanes | None = None) -> None:
        self._identity, self._config, self._lanes = identity, config, lanes
        self.scheme = scheme(lanes)

    def greet(self, peer: Peer, address: str) -> ShmGreeting:
        name = address.removeprefix(self.scheme)
        wiring, lane = _say_hello(peer, name, self._identity, self._config, self._lanes)
        return ShmGreeting(peer, self._identity, self._config, wiring, lane)

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.close()


class ShmGreeting:
    def __init__(
        self, peer: Peer, identity: LinkIdentity, config: RouterConfig, wiring: Wiring, lane: Lane | None
    ) -> None:
        self._peer, self._identity, self._config = peer, identity, config
        self.wiring = wiring
        self._lane = lane

    def fileno(self) -> int:
        return self.wiring.sock.fileno()

    def welcomed(self) -> AttentionLink | Greeting:
        try:
            welcome = _read_welcome(self.wiring.sock, self._peer)
            if self._lane is None:
                return self._link()
            self._lane.complete(welcome.lane_key)
        except LinkRefused:
            self.close()
            raise
        return LaneGreeting(self._lane, self._link, self.close).welcomed()

    def _link(self) -> ShmAttentionLink:
        return ShmAttentionLink(self._peer, self._identity, self._config, self.wiring, self._lane)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self.wiring.close()


def _say_hello(
    peer: Peer, name: str, identity: LinkIdentity, config: RouterConfig, lanes: Lanes | None
) -> tuple[Wiring, Lane | None]:
    sock = _new_socket()
    descriptors: list[int] = []
    lane: Lane | None = None
    try:
        sock.connect("\0" + name)
        refuse_other_user(sock)
        segment_fd = create_segment(config.link_bytes_max)
        descriptors += [segment_fd]
        descriptors += [new_bell(), new_bell()]
        segment = map_segment(segment_fd, config.link_bytes_max)
        lane = lanes.offer(config.link_bytes_max) if lanes else None
        greeting = hello(identity, peer.member, config.link_bytes_max, lane.key if lane else b"")
        socket.send_fds(sock, [hello_to_bytes(greeting)], descriptors)
    except (OSError, LinkRefused) as error:
        if lane is not None:
            lane.close()
        _discard(sock, descriptors)
        raise LinkRefused(_why(SCHEME + name, error)) from error
    os.close(segment_fd)
    return Wiring(sock, descriptors[1], descriptors[2], segment), lane


def _read_welcome(sock: socket.socket, peer: Peer) -> Welcome:
    """Read the answer that has arrived. Raises LinkRefused with the peer's reason."""
    try:
        data = sock.recv(HELLO_BYTES_MAX)
    except OSError as error:
        raise LinkRefused(_why("welcome", error)) from error
    if not data:
        raise LinkRefused("closed before it answered")
    welcome = welcome_from_bytes(data)
    refuse_unless_welcome(welcome, peer.member)
    return welcome


def answer(
    sock: socket.socket, identity: LinkIdentity, linked: Collection[Member], config: RouterConfig,
    lanes: Lanes | None = None,
) -> ShmExpertLink:  # fmt: skip
    """Judge the hello that has arrived. Raises LinkRefused, having told the peer and closed its socket."""
    descriptors: list[int] = []
    lane: Lane | None = None
    try:
        data, descriptors, flags, _ = socket.recv_fds(sock, HELLO_BYTES_MAX, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) != _DESCRIPTORS:
            more = "or more" if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else ""
            raise LinkRefused(f"hello: {len(data)} bytes, {len(descriptors)} descriptors {more}; "
                              f"must be at most {HELLO_BYTES_MAX} bytes, {_DESCRIPTORS} descriptors")  # fmt: skip
        greeting = hello_from_bytes(data)
        refused = why_refused(identity, greeting, linked, config)
        if refused:
            raise LinkRefused(refused)
        for bell in descriptors[1:]:
            check_bell(bell)
        segment = map_segment(descriptors[0], greeting.ring_bytes)
        lane = lanes.accept(greeting.lane_key, greeting.ring_bytes) if lanes else None
        sock.send(welcome_to_bytes(Welcome(identity.member, "", lane.key if lane else b"")))
    except (OSError, LinkRefused) as error:
        if lane is not None:
            lane.close()
        why = _why("hello", error)
        _tell(sock, Welcome(identity.member, why))
        _discard(sock, descriptors)
        raise LinkRefused(why) from error
    os.close(descriptors[0])
    wiring = Wiring(sock, descriptors[1], descriptors[2], segment)
    return ShmExpertLink(greeting.sender, identity, config, wiring, lane)


def turn_away(sock: socket.socket, own: Member, why: str) -> None:
    """Refuse a stranger whose hello will not be read. It is dropped: left unread, it would undo our answer."""
    _tell(sock, Welcome(own, why))
    with contextlib.suppress(OSError):  # it has not said it yet
        sock.recv(1)
    sock.close()


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def refuse_other_user(sock: socket.socket) -> None:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise LinkRefused(f"user: the peer is uid {uid}; must be {os.geteuid()}")


def _tell(sock: socket.socket, welcome: Welcome) -> None:
    try:
        sock.send(welcome_to_bytes(welcome))
    except OSError:
        return  # it left first: there is nobody to tell


def _discard(sock: socket.socket, descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    sock.close()  # last: once the peer sees it, nothing is left


def _why(where: str, error: Exception) -> str:
    return str(error) if isinstance(error, LinkRefused) else f"{where}: {error}"

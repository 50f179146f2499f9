"""The attention end of the exchange on one host, between processes.

No thread of its own: links are served within the calls of their end. A peer's death is its socket closing,
which ends a wait at once. A peer that breaks the rules loses its link, with the reason, and no other peer
notices. Waiting is epoll, never spinning: bells watched for edges, sockets for their closing.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from router.config import RouterConfig
from router.errors import EndClosed, LinkRefused, TransportError
from router.placement import Member
from router.transport.base import LinkIdentity, Parcel, Peer, Refusal, RefusalReason, Ticket
from router.transport.shm_handshake import greet, welcomed
from router.transport.shm_link import AttentionLink, Wiring
from router.transport.shm_ring import RingReader, Span
from router.transport.tickets import Outcome, TicketBook

_EVENTS_MAX = 32  # of one wait; more come with the next
_HUNG_UP = select.EPOLLIN | select.EPOLLRDHUP  # EPOLLHUP and EPOLLERR are always watched
_RUNG = select.EPOLLIN | select.EPOLLET


class ShmAttentionEnd:
    def __init__(self, identity: LinkIdentity, config: RouterConfig) -> None:
        self._identity = identity
        self._config = config
        self._book = TicketBook()
        self._links: dict[Member, AttentionLink] = {}  # standing
        self._lost: dict[Peer, str] = {}  # why, until connect omits it
        self._by_socket: dict[int, AttentionLink] = {}
        self._spans: dict[int, list[tuple[RingReader, Span]]] = {}  # by ticket, until released
        self._epoll = select.epoll()
        self._closed = False

    def connect(self, peers: Sequence[Peer], timeout_s: float) -> dict[Member, str]:
        self._refuse_closed()
        for link in list(self._links.values()):
            if link.peer not in peers:
                self._lose(link, "no longer a peer")
        self._lost = {peer: why for peer, why in self._lost.items() if peer in peers}
        failed = {peer.member: why for peer, why in self._lost.items()}
        standing = {link.peer for link in self._links.values()}
        greeted: dict[int, tuple[Peer, Wiring]] = {}
        for peer in peers:
            if peer not in standing and peer not in self._lost:
                try:
                    wiring = greet(peer, self._identity, self._config)
                except LinkRefused as error:
                    failed[peer.member] = str(error)
                else:
                    greeted[wiring.sock.fileno()] = (peer, wiring)
        return failed | self._await_welcomes(greeted, timeout_s)

    def _await_welcomes(self, greeted: dict[int, tuple[Peer, Wiring]], timeout_s: float) -> dict[Member, str]:
        failed = {}
        deadline_s = time.monotonic() + timeout_s
        with select.epoll() as waiting:
            for descriptor in greeted:
                waiting.register(descriptor, select.EPOLLIN)
            while greeted:
                answered = waiting.poll(max(0.0, deadline_s - time.monotonic()), _EVENTS_MAX)
                for descriptor, _ in answered:
                    peer, wiring = greeted.pop(descriptor)
                    waiting.unregister(descriptor)
                    try:
                        welcomed(wiring.sock, peer)
                    except LinkRefused as error:
                        wiring.close()
                        failed[peer.member] = str(error)
                    else:
                        self._add(AttentionLink(peer, self._identity, self._config, wiring))
                if not answered:
                    break
        for peer, wiring in greeted.values():
            wiring.close()
            failed[peer.member] = f"no welcome within {timeout_s} s"
        return failed

    def _add(self, link: AttentionLink) -> None:
        self._links[link.peer.member] = link
        self._by_socket[link.wiring.sock.fileno()] = link
        self._epoll.register(link.wiring.sock, _HUNG_UP)
        self._epoll.register(link.wiring.replies_bell, _RUNG)

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        self._refuse_closed()
        ticket = self._book.open(parcels)
        for index, parcel in enumerate(parcels):
            refusal = self._send(parcel, index)
            if refusal is not None:
                self._book.settle(ticket.number, index, refusal)
        return ticket

    def _send(self, parcel: Parcel, index: int) -> Refusal | None:
        link = self._links.get(parcel.to)
        if link is None:
            why = [why for peer, why in self._lost.items() if peer.member == parcel.to]
            return Refusal(RefusalReason.PEER_LOST, why[0] if why else "not connected")
        try:
            return link.send(parcel, index)
        except TransportError as error:
            self._lose(link, str(error))
            return Refusal(RefusalReason.PEER_LOST, str(error))

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Outcome]:
        deadline_s = time.monotonic() + timeout_s
        self._drain()
        while not self._book.settled(ticket):
            left_s = deadline_s - time.monotonic()
            for descriptor, _ in self._epoll.poll(max(0.0, left_s), _EVENTS_MAX):
                link = self._by_socket.get(descriptor)
                if link is not None:
                    self._drain()  # what it published before it died still counts
                    self._lose(link, _last_words(link.wiring.sock))
            self._drain()
            if left_s <= 0:
                break
        return self._book.collect(ticket, timeout_s)

    def _drain(self) -> None:
        for link in list(self._links.values()):
            try:
                while (answer := link.poll()) is not None:
                    if self._book.settle(answer.ticket, answer.parcel_index, answer.outcome):
                        self._spans.setdefault(answer.ticket, []).append((link.replies, answer.span))
                    else:
                        link.replies.free(answer.span)  # too late
            except TransportError as error:
                self._lose(link, str(error))

    def release(self, ticket: Ticket) -> None:
        self._book.drop(ticket)
        for replies, span in self._spans.pop(ticket.number, ()):
            replies.free(span)

    def lost(self) -> frozenset[Member]:
        return frozenset(peer.member for peer in self._lost)

    def close(self) -> None:
        self._closed = True
        for link in list(self._links.values()):
            self._lose(link, "closed")
        self._spans.clear()
        self._epoll.close()

    def _lose(self, link: AttentionLink, why: str) -> None:
        if self._links.pop(link.peer.member, None) is None:
            return
        self._lost[link.peer] = why
        del self._by_socket[link.wiring.sock.fileno()]
        self._epoll.unregister(link.wiring.sock)
        self._epoll.unregister(link.wiring.replies_bell)
        link.wiring.close()
        for number, index in link.unanswered:
            self._book.settle(number, index, Refusal(RefusalReason.PEER_LOST, why))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EndClosed(f"attention end of {self._identity.member}: closed")


def _last_words(sock: socket.socket) -> str:
    """Why a socket became readable on which the peer has nothing to say."""
    try:
        return "the peer speaks out of turn" if sock.recv(1) else "the peer has closed its socket"
    except OSError as error:
        return f"the peer's socket: {error}"

"""The attention end of an exchange whose links may be of several kinds, one for each peer.

Links are served within the calls of the end, by one thread that waits for all of them at once. A peer's death
ends its link, and with that a wait. A peer that breaks the rules loses its link, with the reason, and no other
peer notices. Each peer is linked by the first dialer that reaches it: whether it is on this host is found by
trying, not by its address.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from router.config import RouterConfig
from router.errors import EndClosed, LinkRefused, PeerGone, TransportError
from router.placement import Member
from router.transport.base import LinkIdentity, Parcel, Peer, Prepared, Refusal, RefusalReason, Ticket
from router.transport.link import HOST, AttentionLink, Dialer, Greeting, Span
from router.transport.patience import Patience
from router.transport.tickets import Outcome, TicketBook
from router.transport.watch import Watch

_log = logging.getLogger(__name__)

ADDRESS_SEPARATOR = ","  # between the addresses of a peer that listens in several ways


@dataclass
class _Attempt:
    """To link to one peer."""

    peer: Peer
    ways: Iterator[tuple[Dialer, str]]  # not tried yet
    reasons: list[str] = field(default_factory=list)  # why those tried did not do
    greeting: Greeting | None = None  # waiting for its welcome


class LinkedAttentionEnd:
    def __init__(
        self, identity: LinkIdentity, config: RouterConfig, dialers: Sequence[Dialer],
        device: torch.device = HOST,
    ) -> None:  # fmt: skip
        """`dialers`: the preferred first, all for rows on `device`."""
        self.device = device
        self._identity = identity
        self._config = config
        self._dialers = dialers
        self._book = TicketBook()
        self._links: dict[Member, AttentionLink] = {}  # standing
        self._lost: dict[Peer, str] = {}  # why, until they are no longer peers
        self._known: frozenset[Peer] = frozenset()  # standing or lost; replaced whole, read when preparing
        self._spans: dict[int, list[tuple[AttentionLink, Span]]] = {}  # by ticket, until released
        self._watch = Watch(config.stay_awake_s)
        self._closed = False

    # --- links -------------------------------------------------------------------------------

    def prepare(self, peers: Sequence[Peer], timeout_s: float) -> Prepared:
        self._refuse_closed()
        prepared = Prepared(tuple(peers), {}, {})
        greeted: dict[int, _Attempt] = {}
        for peer in peers:
            if peer not in self._known:
                self._greet(_Attempt(peer, self._ways(peer)), greeted, prepared)
        self._await_welcomes(greeted, prepared, timeout_s)
        return prepared

    def _ways(self, peer: Peer) -> Iterator[tuple[Dialer, str]]:
        """The preferred first."""
        for dialer in self._dialers:
            for address in peer.address.split(ADDRESS_SEPARATOR):
                if address.startswith(dialer.scheme):
                    yield dialer, address

    def _greet(self, attempt: _Attempt, greeted: dict[int, _Attempt], prepared: Prepared) -> None:
        """By the next way; when there is none left, it has failed."""
        peer = attempt.peer
        for dialer, address in attempt.ways:
            try:
                attempt.greeting = dialer.greet(peer, address)
            except LinkRefused as error:
                attempt.reasons.append(str(error))
            else:
                greeted[attempt.greeting.fileno()] = attempt
                return
        schemes = " or ".join(repr(dialer.scheme) for dialer in self._dialers)
        told = "; ".join(dict.fromkeys(attempt.reasons))
        prepared.failed[peer.member] = told or f"address: {peer.address!r}; must start with {schemes}"

    def _await_welcomes(self, greeted: dict[int, _Attempt], prepared: Prepared, timeout_s: float) -> None:
        """Each becomes a link or a failure; none is left waiting. Who refuses one way is greeted in the next."""
        deadline_s = time.monotonic() + timeout_s
        while greeted:
            with select.epoll() as waiting:
                for descriptor in greeted:
                    waiting.register(descriptor, select.EPOLLIN)
                answered = waiting.poll(max(0.0, deadline_s - time.monotonic()))
            if not answered:
                break
            for descriptor, _ in answered:
                attempt = greeted.pop(descriptor)
                assert attempt.greeting is not None
                try:
                    found = attempt.greeting.welcomed()
                except LinkRefused as error:
                    attempt.reasons.append(str(error))
                    self._greet(attempt, greeted, prepared)
                    continue
                if isinstance(found, AttentionLink):
                    prepared.links[attempt.peer] = found
                else:
                    attempt.greeting = found
                    greeted[found.fileno()] = attempt
        for attempt in greeted.values():
            assert attempt.greeting is not None
            attempt.greeting.close()
            prepared.failed[attempt.peer.member] = f"no welcome within {timeout_s:g} s"

    def adopt(self, prepared: Prepared) -> dict[Member, str]:
        self._refuse_closed()
        for link in list(self._links.values()):
            if link.peer not in prepared.peers:
                self._lose(link, "no longer a peer")
        self._lost = {peer: why for peer, why in self._lost.items() if peer in prepared.peers}
        while prepared.links:
            peer, link = prepared.links.popitem()
            if peer.member in self._links or peer in self._lost:
                link.close()
            else:
                self._links[peer.member] = link
                link.join(self._watch)
        failed = prepared.failed | {peer.member: why for peer, why in self._lost.items()}
        standing = {link.peer for link in self._links.values()}
        for peer in prepared.peers:
            if peer not in standing:
                failed.setdefault(peer.member, "not prepared")
        self._known = frozenset(standing | self._lost.keys())
        return failed

    def lost(self) -> frozenset[Member]:
        return frozenset(peer.member for peer in self._lost)

    def transports(self) -> dict[Member, str]:
        return {member: link.kind for member, link in list(self._links.items())}

    def close(self) -> None:
        self._closed = True
        for link in list(self._links.values()):
            self._lose(link, "closed")
        self._spans.clear()
        self._watch.close()
        for dialer in self._dialers:
            dialer.close()

    def _break(self, link: AttentionLink, error: TransportError) -> None:
        """Once per link, and links come with placements: the log is bounded."""
        why = str(error)
        level = logging.INFO if isinstance(error, PeerGone) else logging.WARNING
        _log.log(level, "%s: link to %s broke: %s", self._identity.member, link.peer.member, why)
        self._lose(link, why)

    def _lose(self, link: AttentionLink, why: str) -> None:
        if self._links.pop(link.peer.member, None) is None:
            return
        self._lost[link.peer] = why
        link.close()
        for number, index in link.unanswered:
            self._book.settle(number, index, Refusal(RefusalReason.PEER_LOST, why))

    # --- parcels -----------------------------------------------------------------------------

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
            self._break(link, error)
            return Refusal(RefusalReason.PEER_LOST, str(error))

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Outcome]:
        patience = Patience(timeout_s, self._config.combine_total_s, time.monotonic())
        self._drain()
        while owing := self._book.owing(ticket):
            patience.look(time.monotonic())
            left_s = timeout_s
            for index, parcel in owing:
                own_s = patience.left_s(self._links[parcel.to].heard_s)
                if own_s <= 0:
                    self._book.settle(ticket.number, index, patience.late())
                else:
                    left_s = min(left_s, own_s)
            if self._book.owing(ticket):
                self._watch.wait(patience.nap_s(left_s))
                self._drain()
        return self._book.collect(ticket)

    def _drain(self) -> None:
        for link in list(self._links.values()):
            try:
                while (answer := link.poll()) is not None:
                    if self._book.settle(answer.ticket, answer.parcel_index, answer.outcome):
                        self._spans.setdefault(answer.ticket, []).append((link, answer.span))
                    else:
                        link.free(answer.span)  # too late
            except TransportError as error:
                self._break(link, error)

    def release(self, ticket: Ticket) -> None:
        self._book.drop(ticket)
        for link, span in self._spans.pop(ticket.number, ()):
            link.free(span)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EndClosed(f"attention end of {self._identity.member}: closed")

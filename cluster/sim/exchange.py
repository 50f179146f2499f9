"""The exchange between simulated workers: parcels and replies over streams, with the real tickets and patience."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from cluster.sim.network import End, Network
from cluster.sim.process import Bell, Process, Wait
from router.config import RouterConfig
from router.placement import Member
from router.transport.base import Parcel, Peer, Prepared, Refusal, RefusalReason, Reply, Ticket
from router.transport.patience import Patience
from router.transport.tickets import Outcome, TicketBook

Waiting: TypeAlias = Generator[Wait, None, list[Outcome]]


class Carried(NamedTuple):
    """A parcel on its way."""

    parcel: Parcel
    place: int  # in its ticket


class Answer(NamedTuple):
    ticket: int
    place: int  # of its parcel
    outcome: Outcome


class Pulse(NamedTuple):
    """At work; the first of a link welcomes it."""


@dataclass(eq=False)
class Link:
    """To one expert worker."""

    peer: Peer
    end: End
    lost: str = ""
    is_up: bool = False
    heard_s: float = 0.0
    unanswered: set[tuple[int, int]] = field(default_factory=set)  # (ticket, index)

    def close(self) -> None:
        self.end.close("no longer a peer")


class Exchange:
    """An AttentionEnd. `shake` begins handshakes; `prepare` takes those that have come to an end."""

    device = torch.device("cpu")

    def __init__(self, process: Process, network: Network, config: RouterConfig) -> None:
        self._process, self._network, self._config = process, network, config
        self._book = TicketBook()
        self._links: dict[Peer, Link] = {}
        self._shaken: dict[Peer, Link] = {}
        self.bell = Bell()  # something was heard

    def shake(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            if peer not in self._links and peer not in self._shaken:
                self._shaken[peer] = self._connect(peer)

    def is_shaking(self) -> bool:
        return any(not link.is_up and not link.lost for link in self._shaken.values())

    def _connect(self, peer: Peer) -> Link:
        end = self._network.connect(
            self._process, peer.address, lambda heard: self._hear(link, heard), lambda why: self._lose(link, why)
        )
        link = Link(peer, end)
        return link

    def _hear(self, link: Link, heard: Answer | Pulse) -> None:
        link.is_up, link.heard_s = True, self._process.now_s()
        if isinstance(heard, Answer) and (heard.ticket, heard.place) in link.unanswered:
            link.unanswered.remove((heard.ticket, heard.place))
            self._book.settle(*heard)
        self.bell.ring()

    def _lose(self, link: Link, why: str) -> None:
        link.lost = link.lost or why
        for ticket, index in link.unanswered:
            self._book.settle(ticket, index, Refusal(RefusalReason.PEER_LOST, why))
        link.unanswered.clear()
        self.bell.ring()

    # What the dispatcher asks of an end.

    def prepare(self, peers: Sequence[Peer], timeout_s: float) -> Prepared:  # noqa: ARG002
        prepared = Prepared(tuple(peers), {}, {})
        for peer in peers:
            link = self._shaken.pop(peer, None)
            if link is not None and link.is_up and not link.lost:
                prepared.links[peer] = link
            elif link is not None:
                link.close()
                prepared.failed[peer.member] = link.lost or "no welcome in time"
        return prepared

    def adopt(self, prepared: Prepared) -> dict[Member, str]:
        for peer in [peer for peer in self._links if peer not in prepared.peers]:
            link = self._links.pop(peer)
            self._lose(link, "no longer a peer")
            link.close()
        while prepared.links:
            peer, link = prepared.links.popitem()
            self._links[peer] = link
        return prepared.failed | {peer.member: link.lost for peer, link in self._links.items() if link.lost}

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        ticket = self._book.open(parcels)
        links = {peer.member: link for peer, link in self._links.items()}
        for index, parcel in enumerate(parcels):
            refusal = self._send(links.get(parcel.to), parcel, index)
            if refusal is not None:
                self._book.settle(ticket.number, index, refusal)
        return ticket

    def _send(self, link: Link | None, parcel: Parcel, index: int) -> Refusal | None:
        if link is None or link.lost:
            return Refusal(RefusalReason.PEER_LOST, link.lost if link else "not connected")
        if len(link.unanswered) >= self._config.parcels_in_flight_max:
            return Refusal(RefusalReason.OVERLOADED, f"{len(link.unanswered)} parcels in flight")
        link.unanswered.add((parcel.ticket, index))
        carry(link.end, Carried(parcel, index))
        return None

    def outcomes(self, ticket: Ticket) -> Waiting:
        """What `combine` does, the waits yielded."""
        timeout_s = self._config.combine_timeout_s
        patience = Patience(timeout_s, self._config.combine_total_s, self._process.now_s())
        while owing := self._book.owing(ticket):
            heard_s = {peer.member: link.heard_s for peer, link in self._links.items()}
            patience.look(self._process.now_s())
            left_s = timeout_s
            for index, parcel in owing:
                own_s = patience.left_s(heard_s[parcel.to])
                if own_s <= 0:
                    self._book.settle(ticket.number, index, patience.late())
                else:
                    left_s = min(left_s, own_s)
            if self._book.owing(ticket):
                yield self.bell, patience.nap_s(left_s)
        return self._book.collect(ticket)

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Reply | Refusal]:
        raise NotImplementedError("the simulator waits with `outcomes`")

    def release(self, ticket: Ticket) -> None:
        self._book.drop(ticket)
        for link in self._links.values():
            link.unanswered = {key for key in link.unanswered if key[0] != ticket.number}

    def lost(self) -> frozenset[Member]:
        return frozenset(peer.member for peer, link in self._links.items() if link.lost)

    def transports(self) -> dict[Member, str]:
        return {peer.member: "simulated" for peer, link in self._links.items() if not link.lost}

    def close(self) -> None:
        for link in (*self._links.values(), *self._shaken.values()):
            link.close()


def carry(end: End, message: Carried | Answer) -> None:
    """A parcel or its answer may be lost or come twice, where faults say so: `router.transport.faulty`."""
    chance, network = end.network.world.rng.random(), end.network
    if chance >= network.parcel_loss:
        end.send(message)
    if chance >= 1.0 - network.parcel_twice:
        end.send(message)

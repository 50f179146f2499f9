"""The exchange within one process: tests, simulator, colocated baseline.

Parcels are handed over, not copied; replies are copied, since an expert worker may reuse its buffers. All
ends of a hub share one lock and each waits on a condition of its own, so ends may live in any threads.
Closing an expert end is its death to its peers: PEER_LOST at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.config import RouterConfig
from router.errors import EndClosed
from router.placement import Member
from router.transport import frame
from router.transport.base import (
    UNTIMED,
    LinkIdentity,
    Parcel,
    Peer,
    Prepared,
    Refusal,
    RefusalReason,
    Reply,
    Spent,
    Ticket,
)
from router.transport.handshake import hello, superseded, why_refused
from router.transport.link import HOST
from router.transport.patience import PULSES, Patience
from router.transport.tickets import Outcome, TicketBook


class LocalHub:
    """Stands for the network: the addresses, and one lock. Give it to every end of the process."""

    def __init__(self, device: torch.device = HOST) -> None:
        """`device`: where rows lie."""
        self.device = device
        self.lock = threading.Lock()
        self.expert_ends: dict[str, LocalExpertEnd] = {}


@dataclass(eq=False)
class _Link:
    """What two ends share. Touched under the hub's lock only."""

    sender: Member
    peer: Peer
    book: TicketBook  # the attention end's
    answered: threading.Condition  # the attention end's
    expert: LocalExpertEnd
    unanswered: dict[tuple[int, int], LocalParcel] = field(default_factory=dict)  # by (ticket, index)
    waiting: deque[LocalParcel] = field(default_factory=deque)  # sent, not yet received
    lost: str = ""  # why
    heard_s: float = 0.0  # when the last answer or pulse came

    def settle(self, parcel: LocalParcel, outcome: Outcome) -> None:
        if self.unanswered.pop((parcel.ticket, parcel.index), None) is not None:
            self.book.settle(parcel.ticket, parcel.index, outcome)
            self.heard_s = time.monotonic()
            self.answered.notify_all()
        elif not self.lost:
            raise ValueError(f"parcel {parcel.index} of ticket {parcel.ticket}: answered already")

    def lose(self, why: str) -> None:
        for parcel in list(self.unanswered.values()):
            self.settle(parcel, Refusal(RefusalReason.PEER_LOST, why))
        self.lost = self.lost or why
        self.waiting.clear()

    def leave(self, why: str) -> None:
        self.lose(why)
        self.expert.forget(self)

    def close(self) -> None:
        """Prepared, and not wanted after all. Takes the hub's lock."""
        with self.answered:
            self.leave("not adopted")


@dataclass(frozen=True)
class LocalParcel(Parcel):
    link: _Link = field(repr=False)
    index: int  # its place in the ticket


class LocalAttentionEnd:
    def __init__(self, hub: LocalHub, identity: LinkIdentity, config: RouterConfig) -> None:
        self._hub = hub
        self.device = hub.device
        self._identity = identity
        self._config = config
        self._limits = frame.limits_of(identity, config)
        self._answered = threading.Condition(hub.lock)
        self._book = TicketBook()
        self._links: dict[Peer, _Link] = {}
        self._closed = False

    def prepare(self, peers: Sequence[Peer], timeout_s: float) -> Prepared:  # noqa: ARG002
        with self._hub.lock:
            self._refuse_closed()
            prepared = Prepared(tuple(peers), {}, {})
            for peer in peers:
                if peer not in self._links:
                    self._link(peer, prepared)
            return prepared

    def _link(self, peer: Peer, prepared: Prepared) -> None:
        expert = self._hub.expert_ends.get(peer.address)
        if expert is None:
            prepared.failed[peer.member] = f"address: nobody listens at {peer.address!r}"
            return
        link = _Link(self._identity.member, peer, self._book, self._answered, expert)
        refused = expert.accept(link, self._identity)
        if refused:
            prepared.failed[peer.member] = refused
        else:
            prepared.links[peer] = link

    def adopt(self, prepared: Prepared) -> dict[Member, str]:
        with self._hub.lock:
            self._refuse_closed()
            for peer in self._links.keys() - set(prepared.peers):
                self._drop(peer, "no longer a peer")
            while prepared.links:
                peer, link = prepared.links.popitem()
                self._links[peer] = link
            lost = {peer.member: link.lost for peer, link in self._links.items() if link.lost}
            absent = {peer.member: "not prepared" for peer in prepared.peers if peer not in self._links}
            return absent | prepared.failed | lost

    def _drop(self, peer: Peer, why: str) -> None:
        self._links.pop(peer).leave(why)

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        with self._hub.lock:
            self._refuse_closed()
            ticket = self._book.open(parcels)
            links = {peer.member: link for peer, link in self._links.items()}
            for index, parcel in enumerate(parcels):
                refusal = self._send(links.get(parcel.to), parcel, index)
                if refusal is not None:
                    self._book.settle(ticket.number, index, refusal)
            return ticket

    def _send(self, link: _Link | None, parcel: Parcel, index: int) -> Refusal | None:
        if link is None or link.lost:
            return Refusal(RefusalReason.PEER_LOST, link.lost if link else "not connected")
        malformed = frame.why_malformed(parcel, self._limits)
        if malformed:
            return Refusal(RefusalReason.MALFORMED, malformed)
        if len(link.unanswered) >= self._config.parcels_in_flight_max:
            return Refusal(RefusalReason.OVERLOADED, f"{len(link.unanswered)} parcels in flight")
        sent = LocalParcel(
            parcel.sender, parcel.to, parcel.epoch, parcel.ticket, parcel.layer, parcel.rows,
            parcel.route_rows, parcel.route_experts, link, index, route_weights=parcel.route_weights,
        )  # fmt: skip
        link.unanswered[parcel.ticket, index] = sent
        link.waiting.append(sent)
        link.expert.arrived.notify()
        return None

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Outcome]:
        patience = Patience(timeout_s, self._config.combine_total_s, time.monotonic())
        with self._hub.lock:
            while owing := self._book.owing(ticket):
                heard_s = {peer.member: link.heard_s for peer, link in self._links.items()}
                patience.look(time.monotonic())
                left_s = timeout_s
                for index, parcel in owing:
                    own_s = patience.left_s(heard_s[parcel.to])
                    if own_s <= 0:
                        self._book.settle(ticket.number, index, patience.late())
                    else:
                        left_s = min(left_s, own_s)
                if self._book.owing(ticket):
                    self._answered.wait(patience.nap_s(left_s))
            return self._book.collect(ticket)

    def release(self, ticket: Ticket) -> None:
        with self._hub.lock:
            self._book.drop(ticket)

    def lost(self) -> frozenset[Member]:
        with self._hub.lock:
            return frozenset(peer.member for peer, link in self._links.items() if link.lost)

    def transports(self) -> dict[Member, str]:
        with self._hub.lock:
            return {peer.member: "local" for peer, link in self._links.items() if not link.lost}

    def close(self) -> None:
        with self._hub.lock:
            self._closed = True
            for peer in list(self._links):
                self._drop(peer, "closed")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EndClosed(f"attention end of {self._identity.member}: closed")


class LocalExpertEnd:
    def __init__(self, hub: LocalHub, identity: LinkIdentity, config: RouterConfig) -> None:
        self.address = f"local:{identity.member.id}.{identity.member.incarnation}"
        self.arrived = threading.Condition(hub.lock)
        self._hub = hub
        self.device = hub.device
        self._identity = identity
        self._config = config
        self._limits = frame.limits_of(identity, config)
        self._links: deque[_Link] = deque()  # whose turn it is
        self._pulse_due_s = 0.0
        self._woken = False
        self._closed = False
        with hub.lock:
            if hub.expert_ends.setdefault(self.address, self) is not self:
                raise ValueError(f"address: {self.address!r}; another end listens there")

    def accept(self, link: _Link, claimed: LinkIdentity) -> str:
        """Why the link is refused; empty if it now stands. Under the hub's lock."""
        linked = {other.sender: other for other in self._links}
        refused = why_refused(self._identity, hello(claimed, link.peer.member), linked, self._config)
        if not refused:
            for member in superseded(link.sender, linked):
                linked[member].lose("superseded by a new link")
                self._links.remove(linked[member])
            self._links.append(link)
        return refused

    def forget(self, link: _Link) -> None:
        """The attention end has left. Under the hub's lock."""
        if link in self._links:
            self._links.remove(link)

    def receive(self, timeout_s: float) -> Parcel | None:
        with self._hub.lock:
            self._refuse_closed()
            self.arrived.wait_for(lambda: self._woken or any(link.waiting for link in self._links), timeout_s)
            self._woken, woken = False, self._woken
            if woken:
                return None
            for _ in range(len(self._links)):
                link = self._links[0]
                self._links.rotate(-1)
                if link.waiting:
                    return link.waiting.popleft()
            return None

    def reply(self, parcel: Parcel, rows: Tensor, spent: Spent = UNTIMED) -> None:
        frame.check_answer(parcel, rows, self._limits)
        self._answer(parcel, Reply(rows.clone(), spent, time.perf_counter_ns()))

    def refuse(self, parcel: Parcel, reason: RefusalReason, detail: str = "") -> None:
        self._answer(parcel, Refusal(reason, detail))

    def _answer(self, parcel: Parcel, outcome: Outcome) -> None:
        if not isinstance(parcel, LocalParcel):
            raise TypeError(f"parcel: {type(parcel).__name__}; must be one that receive returned")
        with self._hub.lock:
            parcel.link.settle(parcel, outcome)

    def pulse(self) -> None:
        now_s = time.monotonic()
        if now_s < self._pulse_due_s:
            return
        self._pulse_due_s = now_s + self._config.combine_timeout_s / PULSES
        with self._hub.lock:
            for link in self._links:
                if link.unanswered:
                    link.heard_s = now_s

    def wake(self) -> None:
        with self._hub.lock:
            self._woken = True
            self.arrived.notify()

    def close(self) -> None:
        with self._hub.lock:
            self._closed = True
            self._hub.expert_ends.pop(self.address, None)
            while self._links:
                self._links.pop().lose("the expert end has closed")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EndClosed(f"expert end at {self.address!r}: closed")

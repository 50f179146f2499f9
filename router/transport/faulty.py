"""Ends of any transport, over a bad and slow network: for tests, the simulator and benchmarks.

The attention end loses and duplicates, which needs no time. The expert end delays, reorders and dies: one thread
takes parcels from the wrapped end the moment they come, and alone speaks to it; another keeps the time of replies
under way, for the wait of an end is kept only to the millisecond. So a slow link costs neither side's own thread
anything, as with a real one. What befalls which message: faults.py.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from router.config import RouterConfig
from router.errors import EndClosed
from router.placement import Member
from router.transport import frame
from router.transport.base import (
    UNTIMED,
    AttentionEnd,
    ExpertEnd,
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
from router.transport.faults import Fate, Faults, Wire, fate
from router.transport.patience import PULSES
from router.transport.tickets import Outcome, TicketBook

_COPY = 1 << 63  # in the ticket number of a duplicate; a dispatcher counts up from 1
_IDLE_S = 60.0  # the wrapped end's longest wait; it is woken for anything that happens here


class _Flight(NamedTuple):
    """What became of one ticket's parcels."""

    sent: Ticket | None  # those that the wrapped end carries
    places: list[int]  # of these in the ticket
    unheard: frozenset[int]  # places whose reply will be lost
    copies: Ticket | None  # their outcomes are discarded


class FaultyAttentionEnd:
    def __init__(self, end: AttentionEnd, identity: LinkIdentity, faults: Faults) -> None:
        self.device = end.device
        self._end = end
        self._own = identity.member
        self._faults = faults
        self._book = TicketBook()
        self._flights: dict[int, _Flight] = {}  # by ticket, until released
        self._numbers: dict[Member, int] = {}  # of the next exchange, by peer
        self._never = threading.Event()

    def prepare(self, peers: Sequence[Peer], timeout_s: float) -> Prepared:
        return self._end.prepare(peers, timeout_s)

    def adopt(self, prepared: Prepared) -> dict[Member, str]:
        failed = self._end.adopt(prepared)
        members = {peer.member for peer in prepared.peers}
        self._numbers = {member: number for member, number in self._numbers.items() if member in members}
        return failed

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        ticket = self._book.open(parcels)
        try:
            self._flights[ticket.number] = self._send(parcels)
        except BaseException:
            self._book.drop(ticket)
            raise
        return ticket

    def _send(self, parcels: Sequence[Parcel]) -> _Flight:
        linked = self._end.transports()
        places, unheard, copies = [], set(), []
        for place, parcel in enumerate(parcels):
            its_fate = self._next_fate(parcel.to) if parcel.to in linked else None
            if its_fate is None or not its_fate.out.is_lost:
                places.append(place)
            if its_fate is not None and its_fate.back.is_lost:
                unheard.add(place)
            if its_fate is not None and its_fate.is_duplicated:
                copies.append(replace(parcel, ticket=parcel.ticket | _COPY))
        sent = self._end.dispatch([parcels[place] for place in places]) if places else None
        return _Flight(sent, places, frozenset(unheard), self._end.dispatch(copies) if copies else None)

    def _next_fate(self, to: Member) -> Fate:
        number = self._numbers.get(to, 0)
        self._numbers[to] = number + 1
        return fate(self._faults, self._own, to, number)

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Outcome]:
        owing = self._book.owing(ticket)
        flight = self._flights[ticket.number]
        silent_s = time.monotonic() + timeout_s
        if flight.sent is not None:
            outcomes = self._end.combine(flight.sent, timeout_s)
            for place, outcome in zip(flight.places, outcomes, strict=True):
                if isinstance(outcome, Refusal) or place not in flight.unheard:
                    self._book.settle(ticket.number, place, outcome)
            owing = self._book.owing(ticket)
        if owing:
            self._never.wait(max(0.0, silent_s - time.monotonic()))
        for place, _ in owing:
            self._book.settle(ticket.number, place, Refusal(RefusalReason.DEADLINE, "lost on the way"))
        return self._book.collect(ticket)

    def release(self, ticket: Ticket) -> None:
        self._book.drop(ticket)
        flight = self._flights.pop(ticket.number, None)
        if flight is not None:
            for sent in filter(None, (flight.sent, flight.copies)):
                self._end.release(sent)

    def lost(self) -> frozenset[Member]:
        return self._end.lost()

    def transports(self) -> dict[Member, str]:
        return {member: f"faulty {kind}" for member, kind in self._end.transports().items()}

    def close(self) -> None:
        self._end.close()


class _Underway(NamedTuple):
    """A message on a wire; a heap of them begins with the next to arrive."""

    there_s: float
    number: int  # of all of this end: of those that arrive together the first sent is first
    parcel: Parcel
    fate: Fate
    answer: Reply | Refusal | None  # None: the parcel itself is the message


class _Link:
    def __init__(self, faults: Faults) -> None:
        self.out, self.back = Wire(faults), Wire(faults)
        self.parcels: list[_Underway] = []  # a heap
        self.number = 0  # of the next exchange


class FaultyExpertEnd:
    def __init__(self, end: ExpertEnd, identity: LinkIdentity, config: RouterConfig, faults: Faults) -> None:
        self.device = end.device
        self.address = end.address
        self._end = end
        self._own = identity.member
        self._faults = faults
        self._limits = frame.limits_of(identity, config)
        self._links_max = config.peers_max
        self._pulse_every_s = config.combine_timeout_s / PULSES
        self._pulse_due_s = 0.0
        self._changed = threading.Condition()  # all below is touched while holding it
        self._links: dict[Member, _Link] = {}
        self._turns: deque[Member] = deque()  # whose turn it is
        self._numbers = itertools.count()
        self._held: dict[int, tuple[_Underway, _Link]] = {}  # received and not answered, by id() of the parcel
        self._replies: list[_Underway] = []  # a heap
        self._there: list[_Underway] = []  # replies that have arrived: to be told at once
        self._woken = self._pulsing = self._ending = self._closed = False
        self._failure: Exception | None = None
        self._threads = [
            threading.Thread(target=self._carry, name="faulty-carrier"),
            threading.Thread(target=self._keep_time, name="faulty-time"),
        ]
        for thread in self._threads:
            thread.start()

    # --- the end's thread --------------------------------------------------------------------

    def receive(self, timeout_s: float) -> Parcel | None:
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._refuse_ended()
                if self._woken:
                    self._woken = False
                    return None
                now_s = time.monotonic()
                parcel, next_s = self._arrived(now_s)
                if parcel is not None or now_s >= until_s:
                    return parcel
                self._changed.wait(min(until_s, next_s) - now_s)

    def _arrived(self, now_s: float) -> tuple[Parcel | None, float]:
        """The parcel whose turn it is, if any is there; when the next will be."""
        next_s = math.inf
        for _ in range(len(self._turns)):
            link = self._links[self._turns[0]]
            self._turns.rotate(-1)
            if link.parcels and link.parcels[0].there_s <= now_s:
                arrived = heapq.heappop(link.parcels)
                self._held[id(arrived.parcel)] = arrived, link
                return arrived.parcel, now_s
            if link.parcels:
                next_s = min(next_s, link.parcels[0].there_s)
        return None, next_s

    def reply(self, parcel: Parcel, rows: Tensor, spent: Spent = UNTIMED) -> None:
        frame.check_answer(parcel, rows, self._limits)
        self._answer(parcel, Reply(rows.clone(), spent), frame.reply_bytes(len(rows), self._limits))

    def refuse(self, parcel: Parcel, reason: RefusalReason, detail: str = "") -> None:
        self._answer(parcel, Refusal(reason, detail), frame.HEADER_BYTES + len(frame.encode_detail(detail)))

    def _answer(self, parcel: Parcel, answer: Reply | Refusal, nbytes: int) -> None:
        with self._changed:
            if self._ending:
                return
            if id(parcel) not in self._held:
                raise ValueError(f"parcel of ticket {parcel.ticket}: answered already, or never received")
            arrived, link = self._held.pop(id(parcel))
            now_s = time.monotonic()
            there_s = link.back.arrival_s(now_s, nbytes, arrived.fate.back)
            reply = _Underway(there_s, next(self._numbers), parcel, arrived.fate, answer)
            if there_s <= now_s:
                self._there.append(reply)
                self._end.wake()
            else:
                heapq.heappush(self._replies, reply)
                self._changed.notify_all()

    def pulse(self) -> None:
        now_s = time.monotonic()
        if now_s < self._pulse_due_s:
            return
        self._pulse_due_s = now_s + self._pulse_every_s
        with self._changed:
            if not self._ending:
                self._pulsing = True
                self._end.wake()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._end_threads()
        for thread in self._threads:
            thread.join()
        self._end.close()

    def _end_threads(self) -> None:
        with self._changed:
            if not self._ending:
                self._ending = True
                self._changed.notify_all()
                self._end.wake()

    def _refuse_ended(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._ending:
            raise EndClosed(f"expert end at {self.address!r}: closed")

    # --- the carrier's thread ----------------------------------------------------------------

    def _carry(self) -> None:
        """Alone uses the wrapped end, until it is closed."""
        try:
            while not self._ending:
                parcel = self._end.receive(_IDLE_S)
                if parcel is not None and self._set_out(parcel):
                    self._end_threads()
                    self._end.close()
                    return
                self._deliver()
            self._deliver()  # what was answered before it closed
        except Exception as failure:  # told to who calls `receive`
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _set_out(self, parcel: Parcel) -> bool:
        """A parcel was sent: it arrives later. True: and kills."""
        nbytes = frame.parcel_bytes(len(parcel.rows), len(parcel.route_rows), self._limits)
        with self._changed:
            link = self._link(parcel.sender)
            its_fate = fate(self._faults, parcel.sender, self._own, link.number)
            link.number += 1
            there_s = link.out.arrival_s(time.monotonic(), nbytes, its_fate.out)
            heapq.heappush(link.parcels, _Underway(there_s, next(self._numbers), parcel, its_fate, None))
            self._changed.notify_all()
        return its_fate.is_deadly

    def _link(self, sender: Member) -> _Link:
        link = self._links.get(sender)
        if link is None:
            for other in list(self._turns):
                full = len(self._links) >= self._links_max and not self._links[other].parcels
                if full or other.id == sender.id:  # gone, or superseded
                    del self._links[other]
                    self._turns.remove(other)
            link = self._links[sender] = _Link(self._faults)
            self._turns.append(sender)
        return link

    def _deliver(self) -> None:
        with self._changed:
            replies, self._there = self._there, []
            pulsing, self._pulsing = self._pulsing, False
        for reply in replies:
            if isinstance(reply.answer, Refusal):
                self._end.refuse(reply.parcel, reply.answer.reason, reply.answer.detail)
            elif reply.answer is not None:
                self._end.reply(reply.parcel, reply.answer.rows, reply.answer.spent)
        if pulsing:
            self._end.pulse()

    # --- the time's thread -------------------------------------------------------------------

    def _keep_time(self) -> None:
        """Until closed: a reply that has arrived is told by the carrier."""
        with self._changed:
            while not self._ending:
                now_s = time.monotonic()
                while self._replies and self._replies[0].there_s <= now_s:
                    self._there.append(heapq.heappop(self._replies))
                    self._end.wake()
                self._changed.wait(self._replies[0].there_s - now_s if self._replies else None)

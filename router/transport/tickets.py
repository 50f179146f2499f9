"""Which parcels of which tickets still want an outcome: the attention end's book, whatever the transport.

Every parcel gets exactly one outcome: a reply, a refusal, or the lateness that patience.py finds. No waiting,
no locking and no memory of links here.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.transport.base import Parcel, Refusal, Reply, Ticket

Outcome = Reply | Refusal


class TicketBook:
    def __init__(self) -> None:
        self._open: dict[int, list[Outcome | None]] = {}

    def open(self, parcels: Sequence[Parcel]) -> Ticket:
        numbers = {parcel.ticket for parcel in parcels}
        if len(numbers) != 1 or not numbers.isdisjoint(self._open):
            raise ValueError(f"parcels: ticket numbers {numbers}; must be one number that is not in flight")
        ticket = Ticket(numbers.pop(), tuple(parcels))
        self._open[ticket.number] = [None] * len(parcels)
        return ticket

    def settle(self, number: int, index: int, outcome: Outcome) -> bool:
        """False if nobody waits for it (any more)."""
        outcomes = self._open.get(number)
        if outcomes is None or outcomes[index] is not None:
            return False
        outcomes[index] = outcome
        return True

    def owing(self, ticket: Ticket) -> list[tuple[int, Parcel]]:
        """Index and parcel of those without an outcome."""
        return [
            (index, ticket.parcels[index]) for index, outcome in enumerate(self._of(ticket)) if outcome is None
        ]

    def collect(self, ticket: Ticket) -> list[Outcome]:
        """Take the outcomes, once. None is owing."""
        outcomes = [outcome for outcome in self._of(ticket) if outcome is not None]
        assert len(outcomes) == len(ticket.parcels), "collected while a parcel has no outcome"
        del self._open[ticket.number]
        return outcomes

    def drop(self, ticket: Ticket) -> None:
        """Nobody will combine it. Idempotent."""
        self._open.pop(ticket.number, None)

    def _of(self, ticket: Ticket) -> list[Outcome | None]:
        outcomes = self._open.get(ticket.number)
        if outcomes is None:
            raise ValueError(f"ticket: {ticket.number}; not in flight: already combined or released")
        return outcomes

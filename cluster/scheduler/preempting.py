"""Who gives way when the next in turn finds no room. Pure.

Whose turn it is, fairness between tenants decides; priority only makes room for it. Lowest priority first, and of
equals who has least to compute again. Starvation is bounded: a sequence gives way at most `yields_max` times,
counted by its attempts, so over restarts too; nobody is called while one that gave way waits; and those that wait
to go on are placed before all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import Blocks
from cluster.scheduler.waiting import Waiting
from cluster.scheduler.workers import Held, WorkerBook


@dataclass(frozen=True)
class Preemption:
    """What one worker is to give up."""

    book: WorkerBook
    victims: tuple[Held, ...]
    lost: int  # tokens to be computed again, about

    @property
    def priority(self) -> int:
        """The highest of those who give way."""
        return min(held.priority for held in self.victims)


def who_gives_way(entry: Waiting, books: Iterable[WorkerBook], config: SchedulerConfig) -> Preemption | None:
    """At the worker where it costs least: of those with the lowest priorities, that which loses fewest tokens."""
    found = [asked for book in books if (asked := _at(entry, book, config)) is not None]
    return min(found, key=lambda asked: (-asked.priority, asked.lost, asked.book.worker), default=None)


def _at(entry: Waiting, book: WorkerBook, config: SchedulerConfig) -> Preemption | None:
    if not book.could_take(entry):
        return None
    able = [held for held in book.held.values() if _may_be_asked(held, entry, config)]
    if not book.paused <= {held.handle for held in able}:
        return None  # one that is paused comes first
    able.sort(key=lambda held: (held.handle not in book.paused, -held.priority, book.lost_by(held), -held.handle))
    room, places = book.room(), book.places()
    victims: list[Held] = []
    for held in able:
        if _has_room(book, entry, room, places) and book.paused <= {victim.handle for victim in victims}:
            break
        victims.append(held)
        room, places = room.plus(book.blocks_of(held)), places + 1
    fits = _has_room(book, entry, room, places)
    if not (fits and victims and len(victims) <= config.victims_max):
        return None
    return Preemption(book, tuple(victims), sum(map(book.lost_by, victims)))


def _may_be_asked(held: Held, entry: Waiting, config: SchedulerConfig) -> bool:
    """Not what nobody has claimed: its priority is not known."""
    is_known = held.tokens_total > 0 and not held.stopping
    return is_known and held.priority > entry.submission.priority and held.attempt.number <= config.yields_max


def _has_room(book: WorkerBook, entry: Waiting, room: Blocks, places: int) -> bool:
    return places > 0 and book.blocks_for(entry.num_tokens).fits(room)

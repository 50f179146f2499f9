"""The queue: sequences that wait for a worker. Resumes first, then tenants in turn by what they were served.

Within a tenant by when they came, where each level of priority counts as so many seconds earlier or later: so a
sequence overtakes those that came a bounded time before it, and nobody is overtaken for ever. A resume goes ahead
of all: its client is already reading.

Knows lengths, not tokens' values, and nothing of workers. Pure.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from cluster.scheduler.events import AttemptId, Incarnation, Sibling, Submission
from cluster.scheduler.shares import Shares

Key: TypeAlias = tuple[float, int, int]


@dataclass(slots=True, eq=False)
class Waiting:
    """One sequence in the queue."""

    gateway: Incarnation
    submission: Submission
    sibling: Sibling
    arrival: int
    queued_s: float
    due_s: float = 0.0  # its place among its tenant's, or among those that go on: see `due`
    is_called: bool = False  # others give way to it

    @property
    def attempt(self) -> AttemptId:
        return AttemptId(self.submission.request_id, self.sibling.index, self.sibling.attempt)

    @property
    def key(self) -> Key:
        return (self.due_s, self.arrival, self.sibling.index)

    @property
    def line(self) -> str | None:
        """Whose turn it waits for. None: it goes before all turns."""
        return None if self.is_called or self.goes_on else self.submission.tenant

    @property
    def goes_on(self) -> bool:
        """Whether it ran before. What is only said again, to a scheduler that may not know it, did not."""
        return self.submission.resume and (self.sibling.attempt > 1 or len(self.sibling.accepted) > 0)

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted: what must be computed before it goes on."""
        return len(self.submission.prompt) + len(self.sibling.accepted)

    @property
    def tokens_total(self) -> int:
        """Prompt and answer at their longest."""
        return len(self.submission.prompt) + self.submission.max_tokens

    @property
    def cost(self) -> int:
        """What its tenant pays: tokens at most. A prompt that is computed again is not paid again."""
        left = self.submission.max_tokens - len(self.sibling.accepted)
        return left if self.goes_on else len(self.submission.prompt) + left


def due(entry: Waiting, priority_step_s: float, overtake_s_max: float) -> float:
    """When it would have come had it no priority. Of those that go on only the priority counts, and then the
    arrival."""
    most_s = overtake_s_max / 2
    shift_s = min(max(entry.submission.priority * priority_step_s, -most_s), most_s)
    return shift_s if entry.goes_on else entry.queued_s - entry.submission.waited_s + shift_s


class WaitingQueue:
    """Iterates in order, which placing and leaving do not change while it lasts. Keys are unique: arrivals count
    requests, indices their sequences."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[str | None, list[Key]] = {None: []}
        self._by_key: dict[tuple[int, int], Waiting] = {}  # by arrival and index
        self._by_attempt: dict[AttemptId, Waiting] = {}  # in order of entry: the longest waiting first
        self._per_request: Counter[str] = Counter()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._by_attempt)

    def __iter__(self) -> Iterator[Waiting]:
        """As it would be served if every one could be placed now."""
        lines, by_key = self._lines, self._by_key
        for key in lines[None]:
            yield by_key[key[1:]]
        turns = [(self._shares.account(tenant), tenant, 0) for tenant in lines if tenant is not None]
        heapq.heapify(turns)
        while turns:
            account, tenant, place = turns[0]
            line = lines[tenant]
            entry = by_key[line[place][1:]]
            yield entry
            if place + 1 < len(line):
                heapq.heapreplace(turns, (account + entry.cost, tenant, place + 1))
            else:
                heapq.heappop(turns)

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._by_attempt

    @property
    def num_requests(self) -> int:
        return len(self._per_request)

    @property
    def num_resumes(self) -> int:
        """Sequences that go before all turns."""
        return len(self._lines[None])

    def ahead_of(self, entry: Waiting) -> int:
        """How many sequences come before this one, about: other tenants are taken to ask for as much at a time."""
        own = bisect_left(self._lines.get(entry.line, []), entry.key)
        if entry.line is None:
            return own
        others = (len(line) for tenant, line in self._lines.items() if tenant not in (None, entry.line))
        return own + len(self._lines[None]) + sum(min(length, own + 1) for length in others)

    def add(self, entry: Waiting) -> None:
        key = entry.key
        assert key[1:] not in self._by_key, f"{entry.attempt} waits already as {self._by_key[key[1:]].attempt}"
        if entry.line not in self._lines:
            self._lines[entry.line] = []
            self._shares.enter(entry.submission.tenant)
        insort(self._lines[entry.line], key)
        self._by_key[key[1:]] = self._by_attempt[entry.attempt] = entry
        self._per_request[entry.submission.request_id] += 1
        self.num_tokens += entry.num_tokens

    def remove(self, attempt: AttemptId) -> Waiting:
        """Raises KeyError when it does not wait."""
        entry = self._by_attempt[attempt]
        line = self._lines[entry.line]
        del line[bisect_left(line, entry.key)]
        self._forget(entry)
        self._tidy({entry.line})
        return entry

    def call(self, entry: Waiting) -> None:
        """It goes before all others: they give way to it."""
        name = entry.line
        line = self._lines[name]
        del line[bisect_left(line, entry.key)]
        self._tidy({name})
        entry.is_called, entry.due_s = True, -math.inf
        insort(self._lines[entry.line], entry.key)

    def remove_all(self, entries: Collection[Waiting]) -> None:
        """At the cost of one pass over their lines, however many they are."""
        for entry in entries:
            self._forget(entry)
        touched = {entry.line for entry in entries}
        for name in touched:
            self._lines[name] = [key for key in self._lines[name] if key[1:] in self._by_key]
        self._tidy(touched)

    def overdue(self, now_s: float, wait_s_max: float) -> list[Waiting]:
        """Those that have waited for longer than `wait_s_max`."""
        found = []
        for entry in self._by_attempt.values():
            if now_s - entry.queued_s <= wait_s_max:
                break
            found.append(entry)
        return found

    def restart_waits(self, now_s: float) -> None:
        """Count every wait from now on."""
        for entry in self._by_key.values():
            entry.queued_s = now_s

    def check(self) -> None:
        """Raises AssertionError when lines and counts contradict one another."""
        keys = [key[1:] for line in self._lines.values() for key in line]
        assert len(keys) == len(set(keys)) == len(self._by_attempt)
        assert set(keys) == self._by_key.keys()
        assert all(line == sorted(line) for line in self._lines.values())
        assert all(line for name, line in self._lines.items() if name is not None)
        assert self.num_tokens == sum(entry.num_tokens for entry in self._by_attempt.values())

    def _tidy(self, touched: Collection[str | None]) -> None:
        for name in touched:
            if name is not None and not self._lines[name]:
                del self._lines[name]

    def _forget(self, entry: Waiting) -> None:
        del self._by_key[entry.key[1:]], self._by_attempt[entry.attempt]
        self.num_tokens -= entry.num_tokens
        request_id = entry.submission.request_id
        self._per_request[request_id] -= 1
        if not self._per_request[request_id]:
            del self._per_request[request_id]

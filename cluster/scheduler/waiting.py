"""The queue: sequences that wait for a worker, by priority, then resumes, then arrival.

Knows lengths, not tokens' values, and nothing of workers. Pure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.scheduler.events import AttemptId, Incarnation, Sibling, Submission

Key: TypeAlias = tuple[int, bool, int, int]


@dataclass(frozen=True)
class Waiting:
    """One sequence in the queue."""

    gateway: Incarnation
    submission: Submission
    sibling: Sibling
    arrival: int
    queued_s: float

    @property
    def attempt(self) -> AttemptId:
        return AttemptId(self.submission.request_id, self.sibling.index, self.sibling.attempt)

    @property
    def key(self) -> Key:
        """Its place. A resume goes ahead of its priority: its client is already reading."""
        return (self.submission.priority, not self.submission.resume, self.arrival, self.sibling.index)

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted: what must be computed before it goes on."""
        return len(self.submission.prompt) + len(self.sibling.accepted)

    @property
    def tokens_total(self) -> int:
        """Prompt and answer at their longest."""
        return len(self.submission.prompt) + self.submission.max_tokens


class WaitingQueue:
    """Iterates in order. Keys are unique: arrivals count requests, indices their sequences."""

    def __init__(self) -> None:
        self._order: list[Key] = []
        self._by_key: dict[Key, Waiting] = {}
        self._by_attempt: dict[AttemptId, Waiting] = {}  # in order of entry: the longest waiting first
        self._per_request: Counter[str] = Counter()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Waiting]:
        return (self._by_key[key] for key in self._order)

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._by_attempt

    @property
    def num_requests(self) -> int:
        return len(self._per_request)

    def ahead_of(self, key: Key) -> int:
        """How many sequences come before this place."""
        return bisect_left(self._order, key)

    def add(self, entry: Waiting) -> None:
        key = entry.key
        assert key not in self._by_key, f"{entry.attempt} waits already as {self._by_key[key].attempt}"
        insort(self._order, key)
        self._by_key[key] = self._by_attempt[entry.attempt] = entry
        self._per_request[entry.submission.request_id] += 1
        self.num_tokens += entry.num_tokens

    def remove(self, attempt: AttemptId) -> Waiting:
        """Raises KeyError when it does not wait."""
        entry = self._by_attempt[attempt]
        del self._order[bisect_left(self._order, entry.key)]
        self._forget(entry)
        return entry

    def remove_all(self, entries: Collection[Waiting]) -> None:
        """At the cost of one pass, however many they are."""
        for entry in entries:
            self._forget(entry)
        if entries:
            self._order = [key for key in self._order if key in self._by_key]

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
        for key, entry in self._by_key.items():
            self._by_key[key] = self._by_attempt[entry.attempt] = replace(entry, queued_s=now_s)

    def _forget(self, entry: Waiting) -> None:
        del self._by_key[entry.key], self._by_attempt[entry.attempt]
        self.num_tokens -= entry.num_tokens
        request_id = entry.submission.request_id
        self._per_request[request_id] -= 1
        if not self._per_request[request_id]:
            del self._per_request[request_id]

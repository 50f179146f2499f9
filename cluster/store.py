"""What survives its readers: counters, from which terms and incarnations are drawn, each number once; and records.

The one operation underneath is put-if-absent, so two processes that draw at the same time never get the same
number. `cluster/ray_store.py` is the store of a Ray cluster.
"""

from __future__ import annotations

import threading
from typing import Protocol

POOLS = "pools"  # the record of which workers there should be


class Store(Protocol):
    def claim(self, name: str, number: int) -> bool:
        """Take this number of the counter; False when it has been taken before. Numbers start at 1."""

    def last(self, name: str) -> int:
        """The highest number taken; 0: none."""

    def lasts(self) -> dict[str, int]:
        """That of every counter."""

    def write(self, name: str, version: int, text: str) -> None:
        """A record, which takes the place of its lower versions. One writer for each version."""

    def read(self, name: str) -> str | None:
        """The record of the highest version; None: there is none."""


def draw(store: Store, name: str) -> int:
    """The next number of the counter, ours alone."""
    number = store.last(name) + 1
    while not store.claim(name, number):
        number += 1
    return number


class MemoryStore:
    """A store for one process and its threads."""

    def __init__(self) -> None:
        self._taken: dict[str, set[int]] = {}
        self._records: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def claim(self, name: str, number: int) -> bool:
        with self._lock:
            taken = self._taken.setdefault(name, set())
            is_free = number not in taken
            taken.add(number)
            return is_free

    def last(self, name: str) -> int:
        with self._lock:
            return max(self._taken.get(name, ()), default=0)

    def lasts(self) -> dict[str, int]:
        with self._lock:
            return {name: max(numbers) for name, numbers in self._taken.items()}

    def write(self, name: str, version: int, text: str) -> None:
        with self._lock:
            self._records[name] = max(self._records.get(name, (0, "")), (version, text))

    def read(self, name: str) -> str | None:
        with self._lock:
            return self._records[name][1] if name in self._records else None

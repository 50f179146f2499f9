"""What one thread waits for: descriptors, and who sees to each.

It sleeps in epoll. Before that it may stay awake for a bounded moment, looking again and again and giving its core
to whoever wants it: a core that nobody uses falls asleep, and on a virtual machine it takes some 50 us to come
back, more than a small parcel takes there and back. Where that moment passes in vain it is not tried again at
once: ever more waits, up to 64, go by before the next try, so that long waits cost a hundredth of it (decision
13).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

HUNG_UP = select.EPOLLIN | select.EPOLLRDHUP  # EPOLLHUP and EPOLLERR are always watched
RUNG = select.EPOLLIN | select.EPOLLET  # a bell is only ever added to, never read
READABLE = select.EPOLLIN
_EVENTS_MAX = 32  # of one wait; more come with the next
_SLEPT_MAX = 64  # waits slept through between two tries to stay awake


class Watch:
    def __init__(self, stay_awake_s: float = 0.0) -> None:
        """`stay_awake_s`: before it sleeps, in each wait; 0: never."""
        self._stay_awake_s = stay_awake_s
        self._asleep = 0  # waits to come that sleep at once
        self._in_vain = 0  # as many as after the last try
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None] | None] = {}
        self._removed: set[int] = set()  # since the wait's events were told

    def add(self, descriptor: int, events: int, on_event: Callable[[], None] | None = None) -> None:
        """Without `on_event` it only ends the wait."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = on_event

    def remove(self, descriptor: int) -> None:
        """Before it is closed."""
        del self._handlers[descriptor]
        self._removed.add(descriptor)
        self._epoll.unregister(descriptor)

    def wait(self, wait_s: float) -> bool:
        """At most so long for anything at all, and see to it. False: nothing happened."""
        happened = self._awake(wait_s) if self._stay_awake_s else []
        happened = happened or self._epoll.poll(wait_s, _EVENTS_MAX)
        self._removed.clear()
        for descriptor, _ in happened:
            on_event = self._handlers.get(descriptor)
            if on_event is not None and descriptor not in self._removed:  # else the number may be another's by now
                on_event()
        return bool(happened)

    def _awake(self, wait_s: float) -> list[tuple[int, int]]:
        """What happens within the moment it stays awake."""
        if self._asleep:
            self._asleep -= 1
            return []
        if happened := self._epoll.poll(0, _EVENTS_MAX):
            return happened
        until_s = time.monotonic() + min(wait_s, self._stay_awake_s)
        while time.monotonic() < until_s:
            os.sched_yield()
            if happened := self._epoll.poll(0, _EVENTS_MAX):
                self._in_vain = 0
                return happened
        self._in_vain = self._asleep = min(2 * self._in_vain + 1, _SLEPT_MAX)
        return []

    def close(self) -> None:
        """Idempotent."""
        self._handlers.clear()
        self._epoll.close()

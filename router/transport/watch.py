"""What one thread waits for: descriptors, and who sees to each. Epoll, never spinning."""

from __future__ import annotations

import select
from collections.abc import Callable

HUNG_UP = select.EPOLLIN | select.EPOLLRDHUP  # EPOLLHUP and EPOLLERR are always watched
RUNG = select.EPOLLIN | select.EPOLLET  # a bell is only ever added to, never read
READABLE = select.EPOLLIN
_EVENTS_MAX = 32  # of one wait; more come with the next


class Watch:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None] | None] = {}

    def add(self, descriptor: int, events: int, on_event: Callable[[], None] | None = None) -> None:
        """Without `on_event` it only ends the wait. `on_event` may find nothing: a number may be another's by
        then."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = on_event

    def remove(self, descriptor: int) -> None:
        """Before it is closed."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def wait(self, wait_s: float) -> bool:
        """At most so long for anything at all, and see to it. False: nothing happened."""
        happened = self._epoll.poll(wait_s, _EVENTS_MAX)
        for descriptor, _ in happened:
            on_event = self._handlers.get(descriptor)
            if on_event is not None:
                on_event()
        return bool(happened)

    def close(self) -> None:
        """Idempotent."""
        self._handlers.clear()
        self._epoll.close()

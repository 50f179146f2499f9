"""The end of a greeting whose link has a lane: the peer has welcomed us, and the lane is opening."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from router.errors import LinkRefused, TransportError
from router.transport.lane import Lane
from router.transport.link import AttentionLink, Greeting


class LaneGreeting:
    def __init__(self, lane: Lane, link: Callable[[], AttentionLink], close: Callable[[], None]) -> None:
        """`link` makes it once the lane is open; `close` gives all up."""
        self._lane, self._link, self.close = lane, link, close

    def fileno(self) -> int:
        bell = self._lane.bell
        assert bell is not None, "a lane that is not open at once has a bell"
        return bell

    def welcomed(self) -> AttentionLink | Greeting:
        """When the bell has rung, or to be asked first."""
        with contextlib.suppress(BlockingIOError):
            if self._lane.bell is not None:
                os.eventfd_read(self._lane.bell)  # the next wait is for the next ring
        try:
            if self._lane.is_open():
                return self._link()
        except TransportError as error:
            self.close()
            raise LinkRefused(str(error)) from error
        return self

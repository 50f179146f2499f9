"""A thread that runs an event loop, for a process whose main thread belongs to someone else (Ray)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_S = 0.1


class LoopThread:
    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.turns = 0
        """Grows while the loop turns: what a watch looks at."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._turn()
        self.loop.run_forever()

    def _turn(self) -> None:
        self.turns += 1
        self.loop.call_later(_TURN_S, self._turn)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run it there and wait here. Raises TimeoutError."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Idempotent. What still runs there is abandoned."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout_s)
            self.loop.close()

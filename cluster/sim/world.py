"""Virtual time: events in order of (time, number), chance from one seed, and what was told."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

Action = Callable[[], None]


class Broken(Exception):
    """A promise was broken, or a decider failed: what, and when."""

    def __init__(self, at_s: float, what: str) -> None:
        super().__init__(f"at {at_s:.3f} s: {what}")


class World:
    """`after_event` is called after every event: it raises AssertionError where something must not be."""

    def __init__(self, seed: int, tells: Callable[[str], None] = lambda _line: None) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.num_events = 0
        self.after_event: Action = lambda: None
        self._tells = tells
        self._queue: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, delay_s: float, action: Action) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), action))

    def run(self, until_s: float, is_done: Callable[[], bool] = lambda: False) -> bool:
        """Until then, or until it is done, which is looked at after every event. Raises Broken."""
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            self.num_events += 1
            try:
                action()
                self.after_event()
            except Exception as error:
                # The one net: whatever fails in a simulated process is the story's end, with its time.
                what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                raise Broken(self.now_s, what) from error
            if is_done():
                return True
        self.now_s = max(self.now_s, until_s)
        return False

    def between(self, least_s: float, most_s: float) -> float:
        return self.rng.uniform(least_s, most_s)

    def tell(self, what: str) -> None:
        """A line of the story."""
        self._tells(f"{self.now_s:7.2f}  {what}")

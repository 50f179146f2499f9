"""How fast experts are loaded beside the work: so many bytes a second, on average. Pure: time is an argument."""

from __future__ import annotations


class Pace:
    def __init__(self, bytes_per_s: int, now_s: float) -> None:
        """`bytes_per_s` 0: unbounded."""
        self._bytes_per_s, self._due_s = bytes_per_s, now_s

    def wait_s(self, nbytes: int, now_s: float) -> float:
        """How long to rest after so many have been loaded. What a slow load took is not made up for later."""
        if not self._bytes_per_s:
            return 0.0
        self._due_s += nbytes / self._bytes_per_s
        self._due_s = max(self._due_s, now_s)
        return self._due_s - now_s

"""Whether what should turn does turn: a loop, a compute thread, another process. Seen as counts that grow. Pure.

Heartbeats come from a thread of their own, so they prove only that a process lives. After a gap in our own looks
(the whole process was frozen) everything watched gets its time again: it could not have turned either.
"""

from __future__ import annotations

from collections.abc import Mapping


class TurnWatch:
    def __init__(self, stalls_s: Mapping[str, float]) -> None:
        """`stalls_s`: longest pause between two turns, by name of what turns."""
        self._stalls_s = stalls_s
        self._seen: dict[str, tuple[int, float]] = {}  # its turns, and when they last grew
        self._looked_s = float("-inf")

    def look(self, turns: Mapping[str, int], now_s: float) -> str:
        """Why something counts as hung, empty if nothing does. `turns`: of those that should turn now."""
        is_gap = now_s - self._looked_s > min(self._stalls_s.values()) / 2
        self._looked_s = now_s
        hung = []
        for name, count in turns.items():
            before, since_s = self._seen.get(name, (-1, now_s))
            if is_gap or count != before:
                since_s = now_s
            self._seen[name] = (count, since_s)
            if now_s - since_s > self._stalls_s[name]:
                hung.append(f"{name} has not turned for {now_s - since_s:.1f} s")
        return "; ".join(hung)

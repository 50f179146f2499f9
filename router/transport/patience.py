"""How long one combine waits for whom: slow is not dead, but silent is. Pure: time is an argument.

A peer that owes an answer is given up once neither an answer nor a pulse came from it for `timeout_s`, and
everybody once `total_s` have passed in all. Who waits looks at least four times within `timeout_s`; a far longer
gap between two looks means that this process itself stood still, and then nobody's silence counts.
"""

from __future__ import annotations

from router.transport.base import Refusal, RefusalReason

PULSES = 4  # of a worker at work, within `combine_timeout_s`


class Patience:
    def __init__(self, timeout_s: float, total_s: float, now_s: float) -> None:
        self._timeout_s, self._total_s = timeout_s, total_s
        self._since_s = now_s  # silence counts from here
        self._looked_s = now_s
        self._end_s = now_s + total_s

    def look(self, now_s: float) -> None:
        """Before each judgement."""
        gap_s = now_s - self._looked_s
        if gap_s > self._timeout_s / 2:
            self._since_s = now_s
            self._end_s += gap_s
        self._looked_s = now_s

    def left_s(self, heard_s: float) -> float:
        """Until a peer last heard then is given up; 0 or less: now."""
        return min(max(self._since_s, heard_s) + self._timeout_s, self._end_s) - self._looked_s

    def nap_s(self, left_s: float) -> float:
        """How long to wait before the next look."""
        return max(0.0, min(left_s, self._timeout_s / 4))

    def late(self) -> Refusal:
        if self._looked_s >= self._end_s:
            return Refusal(RefusalReason.DEADLINE, f"no answer within {self._total_s:g} s (combine_total_s)")
        return Refusal(RefusalReason.DEADLINE, f"neither answer nor pulse within {self._timeout_s:g} s")

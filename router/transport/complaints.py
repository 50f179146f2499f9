"""What the log says of peers that were refused: the first few of each kind in a while, then only how many more.

Anybody who reaches a door may knock as often as they like; what they make us write must be bounded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

TOLD_MAX = 5  # of one kind, in one window
KINDS_MAX = 16  # told apart; what comes beyond is of one kind
WINDOW_S = 60.0
_WHY_CHARACTERS_MAX = 300


class Complaints:
    """From any thread."""

    def __init__(self, log: logging.Logger, where: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._where, self._clock = log, where, clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()  # in this window, by kind
        self._window_ends_s = clock() + WINDOW_S

    def note(self, why: str) -> None:
        """`why` is ours up to its first colon: that is its kind. The rest may be a stranger's words."""
        kind = why.partition(":")[0]
        with self._lock:
            if self._clock() >= self._window_ends_s:
                self._sum_up()
                self._window_ends_s = self._clock() + WINDOW_S
            if kind not in self._counts and len(self._counts) >= KINDS_MAX:
                kind = "other"
            self._counts[kind] += 1
            told = self._counts[kind]
        if told <= TOLD_MAX:
            cut = why[:_WHY_CHARACTERS_MAX].encode("unicode_escape").decode()  # one line, whoever wrote it
            more = "" if told < TOLD_MAX else "; more of this kind are only counted"
            self._log.warning("%s: refused: %s%s", self._where, cut, more)

    def close(self) -> None:
        """Say what was only counted. Idempotent."""
        with self._lock:
            self._sum_up()

    def _sum_up(self) -> None:
        for kind, count in self._counts.items():
            if count > TOLD_MAX:
                self._log.warning("%s: refused %d more: %s", self._where, count - TOLD_MAX, kind)
        self._counts.clear()

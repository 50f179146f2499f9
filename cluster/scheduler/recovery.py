"""What a new term waits for before it places anything. Pure."""

from __future__ import annotations

from collections.abc import Collection

from cluster.scheduler.events import Incarnation


class Recovery:
    """Over once every expected worker has been heard, or at the deadline. Then it stays over."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._expected: frozenset[Incarnation] | None = None  # None: the controller has not said
        self._newest: dict[str, int] = {}  # life of each id that was ever expected; ids are used again
        self._began_s: float | None = None
        self._unheard: frozenset[Incarnation] = frozenset()  # when it was over
        self.over = False

    def expect(self, workers: frozenset[Incarnation]) -> None:
        self._expected = workers
        for worker in workers:
            self._newest[worker.id] = max(worker.number, self._newest.get(worker.id, 0))

    def has_lost(self, worker: Incarnation) -> bool:
        """Whether the controller expected this life, or a later one, and does so no more."""
        return not self.expects(worker) and worker.number <= self._newest.get(worker.id, 0)

    def expects(self, worker: Incarnation) -> bool:
        """False only when the controller has said who lives, and it is not among them."""
        return self._expected is None or worker in self._expected

    def restart(self, now_s: float) -> None:
        self._began_s = now_s

    def is_blind(self, heard: Collection[Incarnation]) -> bool:
        """Whether a worker that was not heard in time may still run what an older term gave it."""
        return any(worker not in heard and self.expects(worker) for worker in self._unheard)

    def judge(self, heard: Collection[Incarnation], now_s: float) -> bool:
        """True once: when it has just ended."""
        if self.over:
            return False
        if self._began_s is None:
            self._began_s = now_s
        self._unheard = frozenset(worker for worker in self._expected or () if worker not in heard)
        is_complete = self._expected is not None and not self._unheard
        self.over = is_complete or now_s - self._began_s >= self._deadline_s
        return self.over

"""What experts were asked for lately, from what their workers have counted in all their lives. Pure.

An expert's load is in reads of its weights: each computation that had rows for it, and the rows, of which so many
take as long as a read. It decays by half-life, so that it is about as recent as that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.membership import ExpertLoad
from router.placement import Member

Loads = NDArray[np.float64]


class LoadBook:
    def __init__(self, num_layers: int, num_experts: int, half_life_s: float, rows_per_read: float) -> None:
        self._half_life_s, self._rows_per_read = half_life_s, rows_per_read
        self._load: Loads = np.zeros((num_layers, num_experts))  # as of the last report
        self._levels: dict[str, Loads] = {}  # by worker id, [L]: since the placement last changed
        self._heard: dict[str, tuple[Member, Loads]] = {}  # by worker id: what its life had counted, [L, E]
        self._at_s = 0.0

    @property
    def load(self) -> Loads:
        """[L, E], as of the last report. All zero: nothing is known."""
        return self._load.copy()

    @property
    def levels(self) -> dict[str, float]:
        """By worker id: its load, of all layers together, since the placement last changed."""
        return {worker: float(levels.sum()) for worker, levels in sorted(self._levels.items())}

    def imbalance(self, workers: tuple[str, ...]) -> float | None:
        """The busiest of these workers' load over their mean, summed over layers, since the placement last
        changed: 1 is perfect. None: nothing was asked for."""
        nothing = np.zeros(len(self._load))
        levels = np.array([self._levels.get(worker, nothing) for worker in workers])  # [W, L]
        if not levels.size or not levels.any():
            return None
        return float(levels.max(axis=0).sum() / levels.mean(axis=0).sum())

    def hear(self, member: Member, counted: ExpertLoad, now_s: float) -> None:
        """What the first report of a life has counted was before our time, or is next to nothing."""
        self._decay(now_s)
        slots = np.array(counted.slots, dtype=np.int64)
        total: Loads = np.zeros(self._load.shape)
        total.reshape(-1)[slots] = np.array(counted.reads) + np.array(counted.rows) / self._rows_per_read
        before = self._heard.get(member.id)
        self._heard[member.id] = (member, total)
        if before is None or before[0] != member:
            return
        came = np.maximum(total - before[1], 0.0)
        self._load += came
        self._levels[member.id] = self._levels.get(member.id, np.zeros(len(came))) + came.sum(axis=1)

    def forget(self, workers: set[str]) -> None:
        """A new placement is in use, with these workers: levels are counted anew."""
        self._levels.clear()
        self._heard = {worker: heard for worker, heard in self._heard.items() if worker in workers}

    def _decay(self, now_s: float) -> None:
        kept = 0.5 ** (max(0.0, now_s - self._at_s) / self._half_life_s)
        self._at_s = max(self._at_s, now_s)
        self._load = np.asarray(self._load * kept)
        self._levels = {worker: kept * levels for worker, levels in self._levels.items()}

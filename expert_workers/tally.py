"""How often each expert of each layer was asked for. Only ever grows; what is recent is the reader's to find."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from router.membership import ExpertLoad


class Tally:
    """Written by the thread that computes, read by any: a reader may miss the batch that is being counted."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._reads = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._rows = np.zeros((num_layers, num_experts), dtype=np.int64)

    def add(self, layer: int, experts: Tensor) -> None:
        """One batch was computed: experts [r] int32 of its routes, on the host."""
        counts = np.bincount(experts.numpy(), minlength=self._rows.shape[1])
        self._rows[layer] += counts
        self._reads[layer] += counts > 0

    def total(self) -> ExpertLoad:
        slots = np.flatnonzero(self._reads)
        reads, rows = self._reads.reshape(-1)[slots], self._rows.reshape(-1)[slots]
        return ExpertLoad(tuple(slots.tolist()), tuple(reads.tolist()), tuple(rows.tolist()))

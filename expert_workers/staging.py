"""The way from parcels to a GPU and back. On the CPU, and where links carry rows from GPU to GPU, it is not in
the path.

Rows pass through the host's pinned memory, used again by every batch. One stream: waiting for the copy out is
waiting for the copy in, so neither buffer is in use when the next batch comes. Legend: r routes · H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.device import HOST, host_buffer


class Staging:
    def __init__(self, device: torch.device, rows_on: torch.device = HOST) -> None:
        """`rows_on`: where rows lie that links carry. Where that is the device itself, nothing is staged."""
        self._device = device
        self._is_needed = device != rows_on
        self._buffers: dict[str, Tensor] = {}

    def to_device(self, rows: Tensor) -> Tensor:
        """[r, H] of the links. Does not wait."""
        if not self._is_needed:
            return rows
        pinned = self._buffer("in", rows)
        pinned.copy_(rows)
        return pinned.to(self._device, non_blocking=True)

    def to_host(self, rows: Tensor) -> Tensor:
        """[r, H] of the device, for the links, valid until the next. If staged, waits until they are computed."""
        return rows if not self._is_needed else self._buffer("out", rows).copy_(rows)

    def _buffer(self, way: str, rows: Tensor) -> Tensor:
        """[r, H]. Grows to the largest batch, which links and `batch_rows_max` bound."""
        held = self._buffers.get(way)
        if held is None or len(held) < len(rows):
            with torch.inference_mode(False):  # else it could not be written outside of inference mode
                held = self._buffers[way] = host_buffer(tuple(rows.shape), rows.dtype, self._device)
        return held[: len(rows)]

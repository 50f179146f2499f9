"""The way from parcels to a GPU and back. On the CPU it is not in the path.

Rows pass through the host's pinned memory, used again by every batch. One stream: waiting for the copy out is
waiting for the copy in, so neither buffer is in use when the next batch comes. Legend: r routes · H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.device import HOST, host_buffer


class Staging:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def to_device(self, rows: Tensor) -> Tensor:
        """[r, H] of the host. Does not wait."""
        if self._device == HOST:
            return rows
        pinned = self._buffer("in", rows)
        pinned.copy_(rows)
        return pinned.to(self._device, non_blocking=True)

    def to_host(self, rows: Tensor) -> Tensor:
        """[r, H] of the device, valid until the next. Waits until they are computed."""
        return rows if self._device == HOST else self._buffer("out", rows).copy_(rows)

    def _buffer(self, way: str, rows: Tensor) -> Tensor:
        """[r, H]. Grows to the largest batch, which links and `batch_rows_max` bound."""
        held = self._buffers.get(way)
        if held is None or len(held) < len(rows):
            with torch.inference_mode(False):  # else it could not be written outside of inference mode
                held = self._buffers[way] = host_buffer(tuple(rows.shape), rows.dtype, self._device)
        return held[: len(rows)]

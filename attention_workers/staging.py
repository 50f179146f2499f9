"""The way from a GPU to the experts and back. On the CPU it is not in the path.

Where links carry rows from GPU to GPU, only expert ids come to the host, to be planned with. Elsewhere:

Rows and routes of a microbatch are copied into the host's pinned memory, dispatched from there, and stay there
until they are combined, for a replan may send them again. Replies are merged on the host, as ever, and their sum
goes back. One thread and one stream, which works in order: to wait for the last copy of a dispatch is to wait for
all that this worker had asked of the device before, and for nothing else.

Legend: T tokens · H hidden · K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.device import host_buffer
from model.gate import Routes
from router.dispatcher import Dispatcher, Pending


class _Slot:
    """Memory of one microbatch in flight."""

    def __init__(
        self, rows_max: int, hidden: int, num_ranks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = host_buffer((rows_max, hidden), dtype, device)
        self.expert_ids = host_buffer((rows_max, num_ranks), torch.int64, device)
        self.weights = host_buffer((rows_max, num_ranks), torch.float32, device)
        self.merged = host_buffer((rows_max, hidden), torch.float32, device)

    def take(self, rows: Tensor, routes: Routes) -> tuple[Tensor, Routes]:
        """As given, on the host. Waits for the device to have computed them."""
        n = len(rows)
        self.rows[:n].copy_(rows, non_blocking=True)
        self.expert_ids[:n].copy_(routes.expert_ids, non_blocking=True)
        self.weights[:n].copy_(routes.weights)
        return self.rows[:n], Routes(self.expert_ids[:n], self.weights[:n])

    def give_back(self, merged: Tensor, device: torch.device) -> Tensor:
        """Does not wait: nothing writes to `merged` before another `take` has, and that waits."""
        self.merged[: len(merged)].copy_(merged)
        return self.merged[: len(merged)].to(device, non_blocking=True)


@dataclass(frozen=True)
class Staged:
    """A dispatch whose rows lie in a slot, until combined or abandoned."""

    pending: Pending
    slot: _Slot


class StagedExperts:
    """What the loop needs of a dispatcher, for tensors of another device than the host."""

    def __init__(
        self, dispatcher: Dispatcher, device: torch.device, *, microbatches: int, hidden: int, num_ranks: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Takes all of the host memory that it will use: for `microbatches` dispatches of the most rows."""
        self._dispatcher = dispatcher
        self._device = device
        shape = (dispatcher.rows_max, hidden, num_ranks)
        self._free = [_Slot(*shape, dtype, device) for _ in range(microbatches)]

    def dispatch(self, layer: int, rows: Tensor, routes: Routes) -> Staged:
        """rows [T, H], routes [T, K], on the device."""
        slot = self._free.pop()
        try:
            return Staged(self._dispatcher.dispatch(layer, *slot.take(rows, routes)), slot)
        except BaseException:
            self._free.append(slot)
            raise

    def combine(self, pending: Staged) -> Tensor:
        """[T, H] float32, on the device."""
        try:
            return pending.slot.give_back(self._dispatcher.combine(pending.pending), self._device)
        finally:
            self._free.append(pending.slot)

    def abandon(self, pending: Staged) -> None:
        self._dispatcher.abandon(pending.pending)
        self._free.append(pending.slot)


class DirectExperts:
    """What the loop needs of a dispatcher whose links take rows from the device, and whose sum lies there."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.combine, self.abandon = dispatcher.combine, dispatcher.abandon

    def dispatch(self, layer: int, rows: Tensor, routes: Routes) -> Pending:
        """rows [T, H], routes [T, K], on the device. Waits for the device to have computed the routes."""
        return self._dispatcher.dispatch(layer, rows, Routes(routes.expert_ids.cpu(), routes.weights))


def to_host(parts: list[Tensor]) -> list[Tensor]:
    """Logits of microbatches, [n, V] each, in one copy; as they are where they are there."""
    if all(part.device.type == "cpu" for part in parts):
        return parts
    return list(torch.cat(parts).cpu().split([len(part) for part in parts]))

"""The pool's KV blocks by number: free + held = total after every call. Knows no tensors."""

from __future__ import annotations

import heapq


class KvBlocks:
    """Hands out block ids, lowest first, so that blocks in use lie together."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A block, or None when the pool is dry."""
        if not self._free:
            return None
        block = heapq.heappop(self._free)
        self._held.add(block)
        return block

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self._held.remove(block)  # KeyError: freed twice, a bug worth stopping for
            heapq.heappush(self._free, block)

    def check(self) -> None:
        assert len(self._free) + len(self._held) == self.total
        assert self._held.isdisjoint(self._free)

"""KV blocks by number, one space for each layer type: free + held = total after every call. Knows no tensors.

Full layers keep every token's keys and values; sliding layers those their window still sees, so a sequence has
a table in each space, and the table of a window moves: blocks leave it at the front and are used again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


def blocks_overlapped(num_tokens: int, block_tokens: int) -> int:
    """The most blocks that so many tokens in a row can lie in, wherever they begin."""
    return -(-(num_tokens - 1) // block_tokens) + 1


class KvBlocks:
    """One space. Hands out block ids, lowest first, so that blocks in use lie together."""

    def __init__(self, total: int, window: int | None = None) -> None:
        """`window`: how many tokens a token of this space's layers sees, itself included; None: all before it."""
        self.total = total
        self.window = window
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

    def first_seen(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def most_held(self, num_tokens: int, chunk_tokens: int, block_tokens: int) -> int:
        """The most blocks a sequence of so many tokens takes of this space while computed in such chunks."""
        most = min(self.total, -(-num_tokens // block_tokens))
        if self.window is not None:
            most = min(most, blocks_overlapped(self.window - 1 + chunk_tokens, block_tokens))
        return most

    def chunk_max(self, block_tokens: int) -> int:
        """The longest chunk that this space holds together with all that it sees, wherever it begins."""
        if self.window is None:
            return self.total * block_tokens
        return (self.total - 1) * block_tokens + 1 - (self.window - 1)

    def check(self) -> None:
        assert len(self._free) + len(self._held) == self.total
        assert self._held.isdisjoint(self._free)


@dataclass
class BlockTable:
    """The blocks of one sequence in one space: `blocks[i]` holds its block number `first + i`."""

    first: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.blocks)

    def leave(self, number: int) -> list[int]:
        """Begin at block `number`, at most `end`, from now on; returns the blocks before it."""
        assert self.first <= number <= self.end
        left, self.blocks = self.blocks[: number - self.first], self.blocks[number - self.first :]
        self.first = number
        return left

    def clear(self) -> list[int]:
        """Hold nothing, as at the start; returns what was held."""
        left, self.first, self.blocks = self.blocks, 0, []
        return left

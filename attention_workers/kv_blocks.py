"""KV blocks by number, one space for each layer type: free + held + cached = total after every call. No tensors.

Full layers keep every token's keys and values; sliding layers those their window still sees, so a sequence has
a table in each space, and the table of a window moves: blocks leave it at the front and are used again.

A whole block may be named after the tokens that it stands for (`prefix_names.py`). Then others may hold it too,
and when nobody holds it any more it is not free but cached: it can still be asked for by its name, until room is
wanted and it is the one that has waited longest. Those that a window has only passed by are given up before all
others: most prompts that begin alike part elsewhere.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


def blocks_overlapped(num_tokens: int, block_tokens: int) -> int:
    """The most blocks that so many tokens in a row can lie in, wherever they begin."""
    return -(-(num_tokens - 1) // block_tokens) + 1


class KvBlocks:
    """One space. Hands out free block ids, lowest first, so that blocks in use lie together; then cached ones."""

    def __init__(self, total: int, window: int | None = None) -> None:
        """`window`: how many tokens a token of this space's layers sees, itself included; None: all before it."""
        self.total = total
        self.window = window
        self.num_evicted = 0
        self.on_forgotten: Callable[[bytes], None] = lambda _name: None  # told each name that is given up
        self._free = list(range(total))
        self._held: dict[int, int] = {}  # block to how many hold it
        self._cached: OrderedDict[int, None] = OrderedDict()  # named and held by nobody, longest first
        self._passed: OrderedDict[int, None] = OrderedDict()  # the same, to be given up before those
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached) + len(self._passed)

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free, or cached and given up for it."""
        return len(self._free) + self.num_cached

    @property
    def names(self) -> list[bytes]:
        """Of all named blocks, held or cached, oldest name first."""
        return list(self._block_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def take(self) -> int | None:
        """A block, or None when the pool is dry."""
        if self._free:
            block = heapq.heappop(self._free)
        elif waiting := self._passed or self._cached:
            block, _ = waiting.popitem(last=False)
            self._forget(block)
            self.num_evicted += 1
        else:
            return None
        self._held[block] = 1
        return block

    def give_back(self, blocks: list[int], *, is_passed: bool = False) -> None:
        """`blocks` in their sequence's order: the last of them is the first to be given up. `is_passed`: and all
        of them before what is not."""
        cached = self._passed if is_passed else self._cached
        for block in reversed(blocks):
            self._held[block] -= 1  # KeyError: freed twice, a bug worth stopping for
            if not self._held[block]:
                del self._held[block]
                if block in self._name_of:
                    cached[block] = None
                else:
                    heapq.heappush(self._free, block)

    # --- names -------------------------------------------------------------------------------

    def hold(self, name: bytes) -> int:
        """The block of this name, held once more. KeyError: there is none."""
        block = self._block_of[name]
        self._cached.pop(block, None)
        self._passed.pop(block, None)
        self._held[block] = self._held.get(block, 0) + 1
        return block

    def name(self, block: int, name: bytes) -> int:
        """A held block is whole. Returns the block to hold instead: one that had the name before holds the same
        bits, and what is there twice is of no use."""
        assert block in self._held
        if name not in self._block_of:
            self._block_of[name] = block
            self._name_of[block] = name
        elif self._block_of[name] != block:
            known = self.hold(name)
            self.give_back([block])
            return known
        return block

    def disown(self, names: Iterable[bytes]) -> None:
        """What blocks of these names contain is not to be trusted: nobody gets them by name any more."""
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                continue
            self._forget(block)
            if block not in self._held:
                self._cached.pop(block, None)
                self._passed.pop(block, None)
                heapq.heappush(self._free, block)

    def _forget(self, block: int) -> None:
        name = self._name_of.pop(block)
        del self._block_of[name]
        self.on_forgotten(name)

    # --- arithmetic --------------------------------------------------------------------------

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

    def check(self, holders: dict[int, int]) -> None:
        """`holders`: how many hold each block, by the tables of those that run."""
        assert self._held == holders
        cached = {*self._cached, *self._passed}
        assert len(self._free) + len(self._held) + self.num_cached == self.total
        assert {*self._free, *self._held, *cached} == set(range(self.total))
        assert {block: name for name, block in self._block_of.items()} == self._name_of
        assert cached <= self._name_of.keys() <= {*self._held, *cached}


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

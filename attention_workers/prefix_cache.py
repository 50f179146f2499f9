"""What of a sequence need not be computed, for its keys and values are still in named blocks. No tensors.

A sequence can go on from P, a whole number of blocks, if every block before P that a token there sees is at
hand: of full layers all of them, of sliding layers those that overlap [P - W + 1, P - 1]. The blocks before
those are not needed and not asked for. The furthest such P counts.

Of a long prompt a window passes by many blocks, and there is room for few. Those are kept longest that a later
prompt is likely to go on from: before the end of a prompt (the next turn of a conversation has it, but its last
tokens may differ), before the end of its answer, and where a prompt was seen to part from one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attention_workers import prefix_names
from attention_workers.kv_blocks import BlockTable, KvBlocks
from model.layer_types import FULL, LayerType

TAIL_WINDOWS = 2
"""How many windows before the end of a prompt are kept longest."""

HINTS_MAX = 16_384
"""Names that have come or gone and of which the scheduler has not heard; further ones it hears of only with the
whole. They are hints: what it does not know costs time."""


class PrefixCache:
    """Reads and names blocks of `spaces`, and counts. With `enabled` False it finds nothing and names nothing."""

    def __init__(self, spaces: Mapping[LayerType, KvBlocks], block_tokens: int, enabled: bool) -> None:
        self.enabled = enabled
        self.num_hits = 0  # sequences that had something to skip
        self.num_hit_tokens = 0
        self.num_tokens = 0  # of all sequences that came
        self._spaces = spaces
        self._block_tokens = block_tokens
        self._changes: dict[int, bool] = {}  # hint to whether its block is here now
        spaces[FULL].on_forgotten = self._gone

    # --- finding -----------------------------------------------------------------------------

    def reach(
        self, names: Sequence[bytes], tables: Mapping[LayerType, BlockTable], computed: int, end: int
    ) -> tuple[int, int]:
        """The furthest position to go on from, at most `end`, and the furthest that full layers would allow;
        `computed` where nothing further is known.

        `names`: of all whole blocks of the sequence; `tables`: its own, which hold what `computed` sees.
        """
        own, last = computed // self._block_tokens, end // self._block_tokens
        if not self.enabled:
            return computed, computed
        full, others = self._spaces[FULL], [kind for kind in self._spaces if kind != FULL]
        begins = {kind: tables[kind].first for kind in others}  # since which block none is missing
        best = furthest = computed
        for number in range(own, last):
            if names[number] not in full:
                break
            position = furthest = (number + 1) * self._block_tokens
            for kind in others:
                if names[number] not in self._spaces[kind]:
                    begins[kind] = number + 1
            if all(self._first(kind, position) >= begins[kind] for kind in others):
                best = position
        return best, furthest

    def skip(
        self, names: Sequence[bytes], tables: Mapping[LayerType, BlockTable], computed: int, position: int
    ) -> None:
        """Have `tables` hold what a token at `position` sees, which `reach` found, instead of what they do."""
        own = computed // self._block_tokens
        for kind, space in self._spaces.items():
            table, first = tables[kind], self._first(kind, position)
            found = [space.hold(names[n]) for n in range(max(first, own), position // self._block_tokens)]
            passed = max(0, first - table.first)  # blocks that the skip leaves behind
            computed_end = max(passed, own - table.first)
            kept, rest = table.blocks[passed:computed_end], (table.blocks[:passed], table.blocks[computed_end:])
            table.first, table.blocks = first, kept + found
            for left in rest:
                space.give_back(left)

    def _first(self, kind: LayerType, position: int) -> int:
        return self._spaces[kind].first_seen(position) // self._block_tokens

    # --- naming ------------------------------------------------------------------------------

    def keep(self, names: Sequence[bytes], tables: Mapping[LayerType, BlockTable], first: int, end: int) -> None:
        """Positions [first, end) have been computed: name the blocks that are whole by that."""
        if not self.enabled:
            return
        for number in range(first // self._block_tokens, end // self._block_tokens):
            for kind, space in self._spaces.items():
                table = tables[kind]
                at = number - table.first
                table.blocks[at] = space.name(table.blocks[at], names[number])
            self._change(names[number], is_here=True)

    def leave(self, tables: Mapping[LayerType, BlockTable], computed: int, given: int, parted: int) -> None:
        """Give back what no later token sees. `given`: tokens that came with the sequence; `parted`: how far some
        other had begun alike."""
        for kind, space in self._spaces.items():
            table, number = tables[kind], tables[kind].first
            for block in table.leave(self._first(kind, computed)):
                at, window = number * self._block_tokens, space.window or 0
                end = at + self._block_tokens
                is_likely = given - TAIL_WINDOWS * window < end <= given or parted - window < end <= parted
                space.give_back([block], is_passed=not is_likely)
                number += 1

    def disown(self, names: Sequence[bytes]) -> None:
        """What a sequence of these names wrote is not to be trusted, not even where its windows have left it."""
        for space in self._spaces.values():
            space.disown(names)

    # --- hints -------------------------------------------------------------------------------

    def changes(self) -> tuple[list[int], list[int]]:
        """Hints of blocks that have come and that have gone since this was last asked, or since `all`."""
        changes, self._changes = self._changes, {}
        return [h for h, is_here in changes.items() if is_here], [
            h for h, is_here in changes.items() if not is_here
        ]

    def all(self) -> list[int]:
        """Hints of all blocks that are here, oldest first."""
        self._changes = {}
        return [prefix_names.hint(name) for name in self._spaces[FULL].names]

    def _gone(self, name: bytes) -> None:
        self._change(name, is_here=False)

    def _change(self, name: bytes, *, is_here: bool) -> None:
        hint = prefix_names.hint(name)
        if hint in self._changes or len(self._changes) < HINTS_MAX:
            self._changes[hint] = is_here

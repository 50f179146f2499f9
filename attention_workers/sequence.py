"""One running sequence, and the part of it that a step computes. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from attention_workers.kv_blocks import BlockTable
from attention_workers.step import AttemptId, Start
from attention_workers.token_counts import TokenCounts
from model.layer_types import LayerType


class Guide(Protocol):
    """What a sequence's grammar allows as its next token."""

    @property
    def has_begun(self) -> bool:
        """Whether the grammar is compiled; until then the sequence takes no part in steps."""

    def allowed(self) -> np.ndarray | None:
        """[V] bool, of which at least one is true; None: any token. Raises GrammarTrouble."""

    def follow(self, token: int) -> None:
        """This token was sampled, and the sequence goes on."""


@dataclass
class Sequence:
    """One running sequence: tokens known, and a block table for each layer type with the keys and values of
    those `computed` that it still sees."""

    start: Start
    tokens: list[int]
    tables: dict[LayerType, BlockTable]
    root: bytes  # of its blocks' names
    names: list[bytes] = field(default_factory=list)  # of its whole blocks
    computed: int = 0
    reached: int = 0  # the furthest `computed` has been
    parted: int = 0  # how far an earlier one had begun alike
    num_cached: int = 0  # prompt tokens that were cached when they were first needed
    is_paused: bool = False
    is_prompt_done: bool = False
    counts: TokenCounts = field(default_factory=TokenCounts)  # of `tokens`, followed where penalties ask for them
    scored: int = 0  # prompt tokens whose logprobs nobody waits for
    guide: Guide | None = None  # None: any token may follow

    def __post_init__(self) -> None:
        self.scored = self.start.score_from or len(self.start.prompt)

    @property
    def order(self) -> tuple[int, int, AttemptId]:
        """Lower runs earlier."""
        return (self.start.priority, self.start.arrival, self.start.attempt)

    @property
    def arrival(self) -> int:
        """Lower came earlier."""
        return self.start.arrival

    @property
    def has_begun(self) -> bool:
        return self.guide is None or self.guide.has_begun

    @property
    def holds_blocks(self) -> bool:
        return any(table.blocks for table in self.tables.values())

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.start.prompt)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def is_scoring(self) -> bool:
        """Whether logprobs of its prompt are still wanted."""
        return self.scored < len(self.start.prompt)


@dataclass(frozen=True)
class Span:
    """Tokens [first, first + count) of a sequence, computed in this step; `samples` if they are its last."""

    sequence: Sequence
    first: int
    count: int

    @property
    def samples(self) -> bool:
        return self.first + self.count == len(self.sequence.tokens)

    @property
    def scores(self) -> range:
        """The prompt's tokens whose logprobs are wanted and come of this: each of the row before it."""
        if not self.sequence.is_scoring:
            return range(0)
        end = min(self.first + self.count + 1, len(self.sequence.start.prompt))
        return range(max(self.first + 1, self.sequence.scored), end)

    @property
    def is_decode(self) -> bool:
        """One token, behind what is computed: not a prompt's chunk."""
        return self.count == 1 and self.first > 0 and self.samples

"""How often each token occurs in a sequence: what penalties are computed from. A function of its tokens alone.

Counting follows the tokens as they come, so that a step costs what is new and the distinct tokens, however long
the sequence is; counting from the start, as after a resume, gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROOM = 64


class TokenCounts:
    """`ids` [D] int64: the distinct tokens, in order of first appearance. `generated` [D] float64: how often each
    was generated; 0 for those of the prompt alone."""

    def __init__(self) -> None:
        self._counted = 0
        self._place: dict[int, int] = {}
        self._ids = np.zeros(_ROOM, np.int64)
        self._generated = np.zeros(_ROOM)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._place)]

    @property
    def generated(self) -> np.ndarray:
        return self._generated[: len(self._place)]

    def follow(self, tokens: Sequence[int], num_prompt: int) -> None:
        """Count what has come since the last call; `tokens` only ever grow, the first `num_prompt` are given."""
        for position in range(self._counted, len(tokens)):
            token = tokens[position]
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._generated = np.concatenate((self._generated, np.zeros_like(self._generated)))
            self._ids[place] = token
            self._generated[place] += position >= num_prompt
        self._counted = len(tokens)

"""How many rows of prompts a step may take beside decodes, and whose they are. Pure: times are told, not taken.

A step that computes prompt rows keeps everybody waiting who decodes. How long such rows take is measured; with it
the rows are limited so that the step stays within what was promised between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

GROWTH_MAX = 1.75
"""Where no time is promised: how long a step with prompt rows may take, in steps without."""

ROWS_MIN = 8
"""Rows of prompts in any step: whatever was promised, a prompt comes to its end."""

SHORTEST = 3
"""Prompts that go beside the first in order: those with least left. With the first they share a step."""

_FRESH = 0.2  # weight of the newest measurement


class Prompt(Protocol):
    """What is asked of a running sequence here."""

    is_paused: bool

    @property
    def order(self) -> Any: ...

    @property
    def pending(self) -> int: ...


P = TypeVar("P", bound=Prompt)


class Pace:
    """What steps took, by what was in them: averages that fade."""

    def __init__(self) -> None:
        self._decode_s = 0.0  # of a step that only decodes
        self._row_s = 0.0  # that a prompt's row adds to it
        self._promised_s = 0.0

    def promise(self, inter_token_s: float) -> None:
        """0: in proportion to a step without prompts."""
        self._promised_s = inter_token_s

    def observe(self, num_decodes: int, num_prompt_rows: int, elapsed_s: float) -> None:
        """A step's rows and the time it took."""
        if num_decodes and not num_prompt_rows:
            self._decode_s = _faded(self._decode_s, elapsed_s)
        elif num_prompt_rows:
            before_s = self._decode_s if num_decodes else 0.0
            self._row_s = _faded(self._row_s, max(0.0, elapsed_s - before_s) / num_prompt_rows)

    def prompt_rows(self, num_decodes: int, rows_left: int) -> int:
        """How many of the `rows_left` of a step prompts may take. All where nobody decodes."""
        if not num_decodes or not rows_left:
            return rows_left
        if not self._row_s or not (self._decode_s or self._promised_s):
            return min(rows_left, ROWS_MIN)  # nothing measured yet
        allowed_s = (self._promised_s or GROWTH_MAX * self._decode_s) - self._decode_s
        return min(rows_left, max(ROWS_MIN, int(allowed_s / self._row_s)))


def in_turn(prompts: Sequence[P]) -> list[P]:
    """Of prompts in order those that this step computes, in order: the first, so that none waits for ever, and
    the shortest of the others, so that none waits for a long one. In strict order while one waits for blocks."""
    if len(prompts) <= 1 + SHORTEST or any(sequence.is_paused for sequence in prompts):
        return list(prompts)
    shortest = sorted(prompts[1:], key=lambda sequence: (sequence.pending, sequence.order))[:SHORTEST]
    return sorted([prompts[0], *shortest], key=lambda sequence: sequence.order)


def share(rows_left: int, num_prompts_left: int) -> int:
    """Rows for the next of them; what one does not need is there for those after it."""
    return -(-rows_left // num_prompts_left)


def _faded(average: float, newest: float) -> float:
    return newest if not average else average + _FRESH * (newest - average)

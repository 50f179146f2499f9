"""How many rows of prompts a step may take beside decodes, and whose they are. Pure: times are told, not taken.

A step that computes prompt rows keeps everybody waiting who decodes. How long such rows take is measured; with it
the rows are limited so that the step stays within what was promised between two tokens. Where fewer rows than are
worth computing would fit, steps without any come between, until what prompts did not take makes up for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

GROWTH = 0.5
"""Where no time is promised: what prompts take beside decodes on average, in steps without prompts. No gap is
shorter than such a step, so at most half of them can be longer than two."""

GROWTH_MAX = 3.0
"""Its bound where many wait: as much as those that wait are of those that decode, up to this. Else a queue of
prompts would be worked off at leisure while few decode, and fewer tokens would come in all."""

GOES_ON = 3
"""As many new prompts does one count whose answer has begun, before a loss or a pause: its reader waits between
two tokens, not for the first."""

PROMISED_MIN = 0.1
"""Of a step without prompts: what prompts may take whatever was promised, so that they come to their end."""

ROWS_MIN = 16
"""Rows of prompts worth a step: one query tile, which is computed whole."""

SHORTEST = 3
"""Prompts that go beside the first in order and the first to come: those with least left. They share a step."""

_FRESH = 0.2  # weight of the newest measurement


class Prompt(Protocol):
    """What is asked of a running sequence here."""

    is_paused: bool

    @property
    def order(self) -> Any: ...

    @property
    def arrival(self) -> int: ...

    @property
    def pending(self) -> int: ...


P = TypeVar("P", bound=Prompt)


class Pace:
    """What steps took, by what was in them: averages that fade; and what prompts may still take."""

    def __init__(self) -> None:
        self._decode_s = 0.0  # of a step that only decodes
        self._row_s = 0.0  # that a prompt's row adds to it
        self._promised_s = 0.0
        self._due_s = 0.0  # what prompts may take of the step that is composed
        self._saved_s = 0.0  # what they were due and did not take; below 0: took beyond it

    def promise(self, inter_token_s: float) -> None:
        """0: in proportion to a step without prompts."""
        self._promised_s = inter_token_s

    def observe(self, num_decodes: int, num_prompt_rows: int, elapsed_s: float) -> None:
        """A step's rows and the time it took."""
        before_s = self._decode_s if num_decodes else 0.0
        if num_decodes and not num_prompt_rows:
            self._decode_s = _faded(self._decode_s, elapsed_s)
        elif num_prompt_rows:
            self._row_s = _faded(self._row_s, max(0.0, elapsed_s - before_s) / num_prompt_rows)
        if num_decodes:
            taken_s = max(0.0, elapsed_s - before_s) if num_prompt_rows else 0.0
            most_s = ROWS_MIN * self._row_s
            self._saved_s = min(max(self._saved_s + self._due_s - taken_s, -most_s), most_s)

    def prompt_rows(self, num_decodes: int, rows_left: int, num_prompts: int = 1) -> int:
        """How many of the `rows_left` of a step `num_prompts` may take. All where nobody decodes."""
        if not num_decodes or not rows_left:
            return rows_left
        if not self._row_s or not (self._decode_s or self._promised_s):
            return min(rows_left, ROWS_MIN)  # nothing measured yet
        self._due_s = self._due(num_decodes, num_prompts)
        rows = int(self._due_s / self._row_s)
        if rows >= ROWS_MIN:
            return min(rows_left, rows - rows % ROWS_MIN)
        is_due = self._due_s + self._saved_s >= ROWS_MIN * self._row_s
        return min(rows_left, ROWS_MIN) if is_due else 0

    def _due(self, num_decodes: int, num_prompts: int) -> float:
        """Seconds of a step."""
        if self._promised_s:
            return max(self._promised_s - self._decode_s, PROMISED_MIN * self._decode_s)
        return self._decode_s * min(GROWTH_MAX, max(GROWTH, num_prompts / num_decodes))


def in_turn(prompts: Sequence[P]) -> list[P]:
    """Of prompts in order those that this step computes, in order: the first; the first to come, so that none
    waits for ever behind higher priorities; and the shortest of the others, so that none waits for a long one. In
    strict order while one waits for blocks."""
    if len(prompts) <= 1 + SHORTEST or any(sequence.is_paused for sequence in prompts):
        return list(prompts)
    oldest = min(range(len(prompts)), key=lambda number: prompts[number].arrival)
    others = [number for number in range(1, len(prompts)) if number != oldest]
    others.sort(key=lambda number: prompts[number].pending)  # of equals the first in order
    return [prompts[number] for number in sorted({0, oldest, *others[:SHORTEST]})]


def share(rows_left: int, num_prompts_left: int) -> int:
    """Rows for the next of them; what one does not need is there for those after it."""
    return -(-rows_left // num_prompts_left)


def _faded(average: float, newest: float) -> float:
    return newest if not average else average + _FRESH * (newest - average)

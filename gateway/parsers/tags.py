"""The tokens that divide a turn of the family: found in a tokenizer by their strings, never by number.

They are added but not special: each is one token and has text. What divides is the token; the same characters
spelled with other tokens are text, and so is a tag where it has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

THINK, THINK_END = "<think>", "</think>"
CALLS, CALLS_END = "<minimax:tool_call>", "</minimax:tool_call>"


@dataclass(frozen=True)
class Tags:
    """Token ids."""

    think: int
    think_end: int
    calls: int
    calls_end: int

    @property
    def ids(self) -> frozenset[int]:
        return frozenset((self.think, self.think_end, self.calls, self.calls_end))

    def leave_thought_open(self, prompt: Sequence[int]) -> bool:
        """Whether the answer begins inside a thought: by the last think token of the prompt, if there is one."""
        last = next((token for token in reversed(prompt) if token in (self.think, self.think_end)), None)
        return last == self.think


@dataclass(frozen=True)
class Mark:
    """A tag in a piece of text: its characters [start, end), its id, its place among the answer's tokens."""

    start: int
    end: int
    token: int
    position: int

    def moved(self, by: int) -> Mark:
        return Mark(self.start + by, self.end + by, self.token, self.position)


def find_tags(id_of: Callable[[str], int | None]) -> Tags | None:
    """None where the tokenizer lacks one of them."""
    think, think_end, calls, calls_end = (id_of(name) for name in (THINK, THINK_END, CALLS, CALLS_END))
    if think is None or think_end is None or calls is None or calls_end is None:
        return None
    return Tags(think, think_end, calls, calls_end)

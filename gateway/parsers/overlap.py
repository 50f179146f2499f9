"""How much of a text's end must wait, because it could still become something that is looked for."""

from __future__ import annotations


def overlap(text: str, wanted: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `wanted`."""
    for length in range(min(len(wanted) - 1, len(text)), 0, -1):
        if text.endswith(wanted[:length]):
            return length
    return 0

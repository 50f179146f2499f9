"""Which tokens would complete a bad word now: a function of the tokens generated so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def completions(bad_words: Sequence[tuple[int, ...]], tokens: Sequence[int], num_prompt: int) -> list[int]:
    """The last token of each word whose others are the last generated ones; the prompt's tokens begin no word.

    `tokens`: all of the sequence, the first `num_prompt` given with its prompt.
    """
    room = len(tokens) - num_prompt
    found = []
    for word in bad_words:
        before = len(word) - 1
        if before <= room and tuple(tokens[len(tokens) - before :]) == word[:-1]:
            found.append(word[-1])
    return found

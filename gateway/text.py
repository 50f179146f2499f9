"""One sequence's tokens become text: detokenised as they come, cut at the first stop string.

Pure: the same tokens give the same text however they are sliced into deltas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gateway.parsers.overlap import overlap
from gateway.parsers.tags import Mark
from gateway.request import FinishReason, GenerateRequest, PromptLogprob, TokenDelta
from gateway.tokens import IncrementalDetokeniser, Tokens


class StopMatcher:
    """Lets text through up to the first stop string, holding back what could still become one.

    First is the one that ends first; of several that end together, the one that begins first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that is certainly before any stop string. After a match nothing more comes.

        A stop string that `text` completes does not count where `may_end` is false; one that begins there does.
        """
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        seen, text = len(self._held), self._held + text
        if may_end:
            begins = [(_at(text, stop, seen), stop) for stop in self._stops]
            found = [(at + len(stop), -len(stop), stop) for at, stop in begins if at >= 0]
            if found:
                end, _, self.matched = min(found)
                self._held = ""
                return text[: end - len(self.matched)]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class Piece:
    """What one delta means for the client: text that may be shown, and the tokens that were taken.

    `offsets` are the positions in the choice's text at which each token's text begins. The last piece of a
    choice has `finish` (STOP or LENGTH), and `stop_reason`: the stop string, or the id of a stop token that is
    not eos. `marks` are the tags within `text`; a tag is in it whole, or cut off by a stop string and no mark.
    `prompt_logprobs` come in a piece of their own, the choice's first: of the prompt's second token on.
    """

    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    marks: tuple[Mark, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


class ChoiceText:
    """One choice, from its first delta to its end. Without a tokenizer there is no text, only tokens."""

    def __init__(
        self,
        choice: int,
        request: GenerateRequest,
        tokens: Tokens | None,
        eos: frozenset[int],
        marked: frozenset[int] = frozenset(),
    ) -> None:
        """`marked`: tokens whose places in the text are wanted."""
        self._choice = choice
        self._stop_token_ids = request.stop_token_ids
        self._min_tokens = request.min_tokens
        self._eos = eos
        self._tokens = tokens
        self._detokeniser = IncrementalDetokeniser(tokens) if tokens is not None else None
        self._matcher = StopMatcher(request.stop)
        self._chars = 0  # decoded so far
        self._marked = marked
        self._marks: deque[Mark] = deque()  # not given out yet, places in the whole text
        self._given = 0  # characters given out
        self._kept = ""  # a tag of which a part is held back

    def take(self, delta: TokenDelta) -> Piece:
        """The piece of this delta; it ends at the token that completes a stop string."""
        text, offsets = "", []
        for position, token in enumerate(delta.tokens, delta.position):
            offsets.append(self._chars)
            text += self._push(token, position)
            if self._matcher.matched is not None:
                break
        finish = delta.finish
        if finish is not None:
            text += self._end(may_end=delta.position + len(delta.tokens) > self._min_tokens)
        if self._matcher.matched is not None:
            finish = FinishReason.STOP
        text, marks = self._marked_text(text, is_last=finish is not None)
        count = len(offsets)
        return Piece(
            self._choice,
            text,
            delta.tokens[:count],
            tuple(offsets),
            delta.logprobs[:count],
            delta.top_logprobs[:count],
            finish,
            self._stop_reason(delta, finish),
            marks,
        )

    def _push(self, token: int, position: int) -> str:
        if self._tokens is None or self._detokeniser is None or token in self._stop_token_ids:
            return ""  # a stop token ends the text, it is not part of it
        decoded = self._detokeniser.push(token)
        self._chars += len(decoded)
        if token in self._marked:
            begin = self._chars - len(self._tokens.bytes_of(token).decode())
            self._marks.append(Mark(begin, self._chars, token, position))
        return self._matcher.push(decoded, may_end=position >= self._min_tokens)

    def _marked_text(self, text: str, *, is_last: bool) -> tuple[str, tuple[Mark, ...]]:
        """What may be given out of `text`, so that a tag comes whole, and the tags in it."""
        text, begin, marks = self._kept + text, self._given, []
        end = begin + len(text)
        while self._marks and self._marks[0].start < end:
            if self._marks[0].end > end:
                end = end if is_last else self._marks[0].start
                break
            marks.append(self._marks.popleft().moved(-begin))
        self._given, self._kept = end, text[end - begin :]
        return text[: end - begin], tuple(marks)

    def _end(self, *, may_end: bool) -> str:
        rest = self._detokeniser.flush() if self._detokeniser is not None else ""
        return self._matcher.push(rest, may_end=may_end) + self._matcher.flush()

    def _stop_reason(self, delta: TokenDelta, finish: FinishReason | None) -> str | int | None:
        if self._matcher.matched is not None:
            return self._matcher.matched
        if finish is FinishReason.STOP and delta.tokens and delta.tokens[-1] not in self._eos:
            return delta.tokens[-1]
        return None


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last, begins = pieces[-1], accumulate((len(p.text) for p in pieces), initial=0)
    return Piece(
        last.choice,
        "".join(p.text for p in pieces),
        tuple(t for p in pieces for t in p.tokens),
        tuple(o for p in pieces for o in p.offsets),
        tuple(x for p in pieces for x in p.logprobs),
        tuple(x for p in pieces for x in p.top_logprobs),
        last.finish,
        last.stop_reason,
        tuple(mark.moved(begin) for p, begin in zip(pieces, begins, strict=False) for mark in p.marks),
        pieces[0].prompt_logprobs,
    )


def _at(text: str, stop: str, seen: int) -> int:
    """Where the first `stop` begins that ends after the first `seen` characters; -1: nowhere."""
    return text.find(stop, max(0, seen - len(stop) + 1))

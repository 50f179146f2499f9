"""Grammars led along beside the model: what each sequence's grammar allows next, from its tokens alone.

Two threads, begun with the first grammar: one compiles, so that nobody who runs waits for who comes; one follows
tokens and computes masks while the model computes the step that needs them. A sequence takes part in steps once
its grammar is compiled. What a gateway sends here it has compiled itself, within bounds of time and size; the
bounds below are for what no look ahead can tell, and end the one request that hits them.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import llguidance
import numpy as np

from attention_workers.step import Grammar, Start

GRAMMARS_MAX = 64
"""Compiled grammars that are kept for further requests."""

MASK_S_MAX = 2.0
"""Longest wait for what a grammar allows as one token. Meanwhile the whole step waits."""

LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=50_000,  # some 0.3 s at worst
    step_max_items=20_000,
    max_lexer_states=20_000,  # some 40 MB
    verbose_errors=False,
)


class GrammarTrouble(Exception):
    """No token can follow, or none was found within the bounds."""


class _Lane:
    """Work in turn, on a thread of its own. At most one piece waits for each sequence."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self.put = self._inbox.put

    def close(self, grace_s: float) -> None:
        self._inbox.put(None)
        self._thread.join(grace_s)

    def _run(self) -> None:
        while (work := self._inbox.get()) is not None:
            work()


class Guides:
    """The grammars of one worker."""

    def __init__(self, tokenizer: Path, vocab_size: int, on_begun: Callable[[], None]) -> None:
        """`tokenizer`: its tokenizer.json, read with the first grammar. `on_begun`: a sequence's grammar is
        compiled; called from another thread."""
        self._path, self._vocab_size, self._on_begun = tokenizer, vocab_size, on_begun
        self._lanes: tuple[_Lane, _Lane] | None = None
        self._tokenizer: tuple[tuple[int, ...], llguidance.LLTokenizer] | None = None  # with its eos
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()

    def open(self, start: Start) -> GrammarGuide | None:
        """For a sequence as its plan has it; None where it may say anything."""
        if start.grammar is None:
            return None
        if self._lanes is None:
            self._lanes = _Lane("attention-grammars"), _Lane("attention-masks")
        compiling, masks = self._lanes
        guide = GrammarGuide(self, start.grammar, masks)
        compiling.put(lambda: self._begin(guide, start.accepted))
        return guide

    def close(self, grace_s: float) -> None:
        for lane in self._lanes or ():
            lane.close(grace_s)

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """At its beginning, the caller's own. Where grammars are compiled. Raises GrammarTrouble."""
        found = self._compiled.get(grammar)
        if found is None:
            found = llguidance.LLMatcher(self._tokens(grammar.eos), grammar.text, log_level=0, limits=LIMITS)
            if found.is_error():
                raise GrammarTrouble(f"the grammar cannot be compiled: {found.get_error()}")
            self._compiled[grammar] = found
            if len(self._compiled) > GRAMMARS_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return found.deep_copy()

    def _tokens(self, eos: tuple[int, ...]) -> llguidance.LLTokenizer:
        if self._tokenizer is None or self._tokenizer[0] != eos:
            try:
                text = self._path.read_text()
            except OSError as error:
                raise GrammarTrouble(f"this checkpoint's {self._path.name} cannot be read: {error}") from error
            made = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(eos))
            self._tokenizer = eos, made
        return self._tokenizer[1]

    def _begin(self, guide: GrammarGuide, generated: tuple[int, ...]) -> None:
        guide.begin(generated)
        self._on_begun()

    def unpacked(self, mask: bytes) -> np.ndarray:
        """[V] bool of one bit for each token."""
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def all_but(self, barred: Sequence[int]) -> np.ndarray:
        mask = np.ones(self._vocab_size, np.bool_)
        mask[list(barred)] = False
        return mask


class GrammarGuide:
    """One sequence's place in its grammar. Other threads move it on, in turn; the one that samples waits."""

    def __init__(self, guides: Guides, grammar: Grammar, masks: _Lane) -> None:
        self._guides, self._grammar, self._masks = guides, grammar, masks
        self._matcher: llguidance.LLMatcher | None = None
        self._is_thinking = bool(grammar.thought_ends)
        self._num_thought = 0
        self._mask: np.ndarray | None = None
        self._trouble: GrammarTrouble | None = None
        self._is_there = threading.Event()  # the mask, or the trouble
        self.has_begun = False

    def allowed(self) -> np.ndarray | None:
        """[V] bool, of which at least one is true; None: any token. Raises GrammarTrouble."""
        if not self._is_there.wait(MASK_S_MAX):
            raise GrammarTrouble(f"the grammar took longer than {MASK_S_MAX:g} s to say what may follow")
        if self._trouble is not None:
            raise self._trouble
        return self._mask

    def follow(self, token: int) -> None:
        self._is_there.clear()
        self._masks.put(lambda: self._move((token,)))

    # --- on the other threads ------------------------------------------------------------------

    def begin(self, generated: Sequence[int]) -> None:
        self._move(generated, is_first=True)
        self.has_begun = True

    def _move(self, tokens: Sequence[int], *, is_first: bool = False) -> None:
        try:
            if is_first and self._grammar.text:
                self._matcher = self._guides.matcher(self._grammar)
            for token in tokens:
                self._take(token)
            self._mask = self._mask_now()
        except GrammarTrouble as trouble:
            self._trouble = trouble
        except BaseException as error:  # whatever a foreign library raises, the one that waits must hear of it
            self._trouble = GrammarTrouble(f"the grammar failed: {type(error).__name__}: {error}")
        self._is_there.set()

    def _take(self, token: int) -> None:
        if self._is_thinking:
            self._is_thinking = token not in self._grammar.thought_ends
            self._num_thought += 1
        elif self._matcher is not None and not self._matcher.consume_token(token):
            raise GrammarTrouble(f"the grammar does not go on with token {token}: {self._matcher.get_error()}")

    def _mask_now(self) -> np.ndarray | None:
        grammar = self._grammar
        if self._is_thinking:
            if self._num_thought >= grammar.thought_tokens_max:
                return ~self._guides.all_but(grammar.thought_ends[:1])
            return self._guides.all_but(grammar.barred) if grammar.barred else None
        if self._matcher is None:
            return None
        mask = self._guides.unpacked(self._matcher.compute_bitmask())
        if self._matcher.is_error() or not mask.any():
            raise GrammarTrouble(f"the grammar has no next token: {self._matcher.get_error() or 'a dead end'}")
        return mask

"""What a grammar allows next is a function of the tokens alone, and is there when the sampler asks."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import llguidance
import numpy as np
import pytest

from attention_workers import guides as guides_module
from attention_workers.guides import GrammarGuide, GrammarTrouble, Guides
from attention_workers.step import AttemptId, Grammar, Sampling, Start
from tests.unit.answers import EOS, TAGS, TOKENS
from tests.unit.gateway_world import tokenizer_json

VOCAB = 400  # some of it unknown to the tokenizer
GRAMMAR = Grammar('start: "a" /[b-y]{2,30}/ "z"', (EOS,))
THINKS = Grammar(GRAMMAR.text, (EOS,), (TAGS.think_end, TAGS.calls), 5, (EOS, TAGS.calls))


@pytest.fixture
def guides(tmp_path: Path) -> Iterator[Guides]:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    made = Guides(tmp_path / "tokenizer.json", VOCAB, lambda: None)
    yield made
    made.close(10)
    assert not [
        thread for thread in threading.enumerate() if thread.name in ("attention-grammars", "attention-masks")
    ]


def opened(guides: Guides, grammar: Grammar, accepted: tuple[int, ...] = ()) -> GrammarGuide:
    start = Start(AttemptId("r", 0, 1), "gw", (1,), accepted, Sampling(), frozenset(), 9, None, grammar=grammar)
    guide = guides.open(start)
    assert guide is not None
    return guide


def allowed(guide: GrammarGuide) -> list[int]:
    mask = guide.allowed()
    assert mask is not None
    assert mask.shape == (VOCAB,)
    return [int(token) for token in np.flatnonzero(mask)]


def test_who_has_no_grammar_needs_no_guide(guides: Guides) -> None:
    """And nothing is read or begun for it."""
    assert guides.open(Start(AttemptId("r", 0, 1), "gw", (1,), (), Sampling(), frozenset(), 9, None)) is None


def test_a_walk_ends_where_the_grammar_does(guides: Guides) -> None:
    guide, text = opened(guides, GRAMMAR), list[int]()
    assert allowed(guide) == [token for token in range(VOCAB) if TOKENS.spelling_of(token)[:1] == b"a" and (
        token == TOKENS.encode("a")[0] or all(98 <= byte <= 121 for byte in TOKENS.spelling_of(token)[1:])
    )]  # fmt: skip
    while EOS not in allowed(guide):
        text.append(allowed(guide)[0])
        guide.follow(text[-1])
    assert allowed(guide) == [EOS]
    assert TOKENS.decode(text)[::33] in ("a", "az")


@pytest.mark.parametrize("grammar", [GRAMMAR, THINKS])
def test_masks_are_of_the_tokens_however_they_came(guides: Guides, grammar: Grammar) -> None:
    """Followed one by one, or all given at the start of another attempt: kill -9 leaves no trace."""
    chance, guide, tokens = random.Random(1), opened(guides, grammar), list[int]()
    for _ in range(12):
        now = allowed(guide)
        assert allowed(opened(guides, grammar, tuple(tokens))) == now
        if now == [EOS]:
            break
        tokens.append(chance.choice([token for token in now if token != EOS]))
        guide.follow(tokens[-1])
    assert len(tokens) > 2


def test_a_thought_is_free_until_it_ends_or_is_ended(guides: Guides) -> None:
    thought = TOKENS.encode("abcde")[:1]
    guide = opened(guides, THINKS)
    assert set(range(VOCAB)) - set(allowed(guide)) == {EOS, TAGS.calls}
    for _ in range(5):
        guide.follow(thought[0])
    assert allowed(guide) == [TAGS.think_end]
    guide.follow(TAGS.think_end)
    assert allowed(guide) == allowed(opened(guides, GRAMMAR))
    early = opened(guides, THINKS, (TAGS.think_end,))
    assert allowed(early) == allowed(opened(guides, GRAMMAR))
    bound = Grammar("", (EOS,), (TAGS.think_end, TAGS.calls), 1)
    assert opened(guides, bound).allowed() is None
    assert allowed(opened(guides, bound, (7,))) == [TAGS.think_end]
    assert opened(guides, bound, (TAGS.calls, 7)).allowed() is None


@pytest.mark.parametrize(
    ("grammar", "accepted", "sentence"),
    [
        (Grammar("start: nowhere", (EOS,)), (), "cannot be compiled"),
        (GRAMMAR, (EOS,), "does not go on with token"),
    ],
)
def test_a_grammar_in_trouble_says_so_where_it_is_waited_for(
    guides: Guides, grammar: Grammar, accepted: tuple[int, ...], sentence: str
) -> None:
    """And the next one is none the worse."""
    with pytest.raises(GrammarTrouble, match=sentence):
        opened(guides, grammar, accepted).allowed()
    assert allowed(opened(guides, GRAMMAR))


def test_who_runs_does_not_wait_for_who_comes(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody for ever."""
    running, go_on = opened(guides, GRAMMAR), threading.Event()
    allowed(running)
    compiled = guides.matcher

    def slowly(grammar: Grammar) -> llguidance.LLMatcher:
        go_on.wait(30)
        return compiled(grammar)

    monkeypatch.setattr(guides, "matcher", slowly)
    coming = opened(guides, Grammar('start: "b"', (EOS,)))
    running.follow(TOKENS.encode("a")[0])
    assert allowed(running)
    assert running.has_begun
    assert not coming.has_begun
    monkeypatch.setattr(guides_module, "MASK_S_MAX", 0.01)
    with pytest.raises(GrammarTrouble, match=r"took longer than 0\.01 s"):
        coming.allowed()
    go_on.set()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    made = Guides(tmp_path / "tokenizer.json", VOCAB, lambda: None)
    with pytest.raises(GrammarTrouble, match=r"tokenizer\.json cannot be read"):
        opened(made, GRAMMAR).allowed()
    made.close(10)


def test_compiled_grammars_are_kept_within_bounds(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides_module, "GRAMMARS_MAX", 2)
    for letter in "abcda":
        allowed(opened(guides, Grammar(f'start: "{letter}"', (EOS,))))
    assert [grammar.text for grammar in guides._compiled] == ['start: "d"', 'start: "a"']

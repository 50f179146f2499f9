"""Tokens to text, one at a time: whole characters only, and nothing beyond the first stop string."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.errors import CheckpointUnreadable
from gateway.request import FinishReason, GenerateRequest, Sampling, TokenDelta
from gateway.text import ChoiceText, StopMatcher, joined
from gateway.tokens import IncrementalDetokeniser, Tokens, load_tokens, shown_token
from tests.unit.gateway_world import ADDED, SPECIAL, card_of, tokenizer_json, write_checkpoint

TOKENIZER = Tokenizer.from_str(tokenizer_json())
TOKENS = Tokens(TOKENIZER)
ANY_IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 7), max_size=30)
TEXT = st.text(alphabet="abAB", max_size=40)
STOPS = st.lists(st.text(alphabet="abAB", min_size=1, max_size=5), max_size=4)


@given(ANY_IDS)
def test_the_parts_together_are_the_whole(ids: list[int]) -> None:
    """Also where bytes are no UTF-8, tokens are special, or ids are unknown."""
    one = IncrementalDetokeniser(TOKENS)
    assert "".join([*map(one.push, ids), one.flush()]) == TOKENS.decode(ids)


@given(st.text(max_size=20))
def test_text_comes_back_and_no_part_is_half_a_character(text: str) -> None:
    one = IncrementalDetokeniser(TOKENS)
    parts = [one.push(token) for token in TOKENS.encode(text)]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    assert one.flush() == ""


def test_encoding_adds_no_token_and_knows_special_ones_by_name() -> None:
    """Templates write the special tokens themselves."""
    ids = TOKENS.encode("]~b]ai\n<think>hello")
    assert ids[0] == TOKENS.id_of("]~b]")
    assert TOKENS.id_of("<think>") in ids
    assert TOKENS.decode(ids) == "ai\n<think>hello"


def test_special_tokens_have_no_text_and_tags_have() -> None:
    assert [TOKENS.bytes_of(TOKENS.id_of(name) or 0) for name in SPECIAL] == [b""] * len(SPECIAL)
    assert [TOKENS.bytes_of(TOKENS.id_of(name) or 0).decode() for name in ADDED] == list(ADDED)


def test_a_token_in_logprobs_has_a_name_whatever_its_bytes() -> None:
    """Text, bytes that are no text, special tokens, and ids nobody knows."""
    (first, *_rest) = TOKENS.encode("🙂"[:1])
    assert shown_token(TOKENS, TOKENS.encode("a")[0]) == "a"
    assert shown_token(TOKENS, first).startswith("bytes:\\xf0")
    assert shown_token(TOKENS, TOKENS.id_of("[e~[") or 0) == "[e~["
    assert shown_token(TOKENS, 100_000) == shown_token(None, 100_000) == "token_id:100000"
    assert shown_token(TOKENS, first, as_id=True) == f"token_id:{first}"


def test_other_tokenizers_are_refused_by_file_and_field(tmp_path: Path) -> None:
    assert load_tokens(tmp_path) is None
    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    with pytest.raises(CheckpointUnreadable, match=r"tokenizer.json: decoder.type is 'Metaspace'"):
        load_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json()[:-100])
    with pytest.raises(CheckpointUnreadable, match=r"tokenizer.json: not a tokenizer"):
        load_tokens(tmp_path)


def test_eos_is_found_by_name_where_no_config_has_it(tmp_path: Path) -> None:
    """Released M2 configs carry no eos id; a server that trusts them never stops."""
    eos = TOKENS.id_of("[e~[")
    assert card_of(write_checkpoint(tmp_path)).eos == {eos}
    assert card_of(write_checkpoint(tmp_path, eos_token_id=[3, 4])).eos == {eos, 3, 4}


def test_generation_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    card = card_of(write_checkpoint(tmp_path, temperature=0.5, top_p=0.95, top_k=40))
    assert card.defaults == Sampling(0.5, 0.95, 40)
    card = card_of(write_checkpoint(tmp_path, min_p=0.1, repetition_penalty=1.05))
    assert card.defaults == Sampling(min_p=0.1, repetition_penalty=1.05)
    with pytest.raises(CheckpointUnreadable, match=r"generation_config.json: top_p is 2"):
        card_of(write_checkpoint(tmp_path, top_p=2))


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at every end in turn; at the first with a stop string before it, cut the longest."""
    for end in range(1, len(text) + 1):
        matched = sorted((stop for stop in stops if text[:end].endswith(stop)), key=len)
        if matched:
            return text[: end - len(matched[-1])], matched[-1]
    return text, None


@given(TEXT, STOPS, st.lists(st.integers(0, 5), max_size=20))
def test_stop_strings_cut_as_in_the_whole_text_however_it_is_sliced(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    """Nothing of a stop string is let through, and nothing before it is lost."""
    matcher, out, rest = StopMatcher(stops), "", text
    for size in [*sizes, len(text)]:
        out, rest = out + matcher.push(rest[:size]), rest[size:]
        assert naive_cut(text, stops)[0].startswith(out)
    assert (out + matcher.flush(), matcher.matched) == naive_cut(text, stops)


@given(TEXT, STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = matcher.push(text)
    if matcher.matched is None:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def request_of(stop: tuple[str, ...], stop_token_ids: frozenset[int] = frozenset()) -> GenerateRequest:
    return GenerateRequest("r", (1,), Sampling(), 100, stop=stop, stop_token_ids=stop_token_ids)


def delta(position: int, tokens: list[int], finish: FinishReason | None = None) -> TokenDelta:
    logprobs = tuple(-0.5 * (position + i) for i in range(len(tokens)))
    return TokenDelta("r", 0, 1, position, tuple(tokens), logprobs, finish=finish)


@given(ANY_IDS.filter(bool), st.lists(st.sampled_from(["e", "lo", " w", "ü", "\ufffd"]), max_size=2), st.data())
def test_an_answer_does_not_depend_on_how_its_tokens_came(
    ids: list[int], stop: list[str], data: st.DataObject
) -> None:
    """One token per delta or several: the same text, tokens, offsets, logprobs and end."""

    def run(cuts: list[int]) -> object:
        text, pieces = ChoiceText(0, request_of(tuple(stop)), TOKENS, frozenset()), []
        for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            pieces.append(
                text.take(delta(begin, ids[begin:end], FinishReason.LENGTH if end == len(ids) else None))
            )
            if pieces[-1].finish:
                break
        return joined(pieces)

    cuts = data.draw(st.lists(st.integers(1, max(1, len(ids) - 1)), unique=True, max_size=5).map(sorted))
    assert run(cuts if len(ids) > 1 else []) == run(list(range(1, len(ids))))


def test_a_stop_string_ends_at_the_token_that_completes_it() -> None:
    """That token is the last one taken, in the middle of a delta too; the rest is surplus."""
    ids = [TOKENS.encode(char)[0] for char in "abcXYZd"]
    text = ChoiceText(3, request_of(("XY",)), TOKENS, frozenset())
    assert text.take(delta(0, ids[:4])).text == "abc"  # X is held back
    piece = text.take(delta(4, ids[4:]))
    assert (piece.choice, piece.text, piece.tokens) == (3, "", (ids[4],))
    assert (piece.finish, piece.stop_reason) == (FinishReason.STOP, "XY")
    assert (piece.logprobs, piece.offsets) == ((-2.0,), (4,))


@given(TEXT.filter(bool), STOPS, st.integers(0, 30))
def test_a_stop_string_counts_once_enough_tokens_have_come(text: str, stops: list[str], least: int) -> None:
    """One that the first `min_tokens` tokens complete does not; one that they begin does."""
    ids = [TOKENS.encode(char)[0] for char in text]
    request = dataclasses.replace(request_of(tuple(stops)), min_tokens=least)
    choice = ChoiceText(0, request, TOKENS, frozenset())
    pieces = []
    for position, token in enumerate(ids):
        finish = FinishReason.LENGTH if position == len(ids) - 1 else None
        pieces.append(choice.take(delta(position, [token], finish)))
        if pieces[-1].finish:
            break
    ends = [end for end in range(least + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    whole = joined(pieces)
    if not ends:
        assert (whole.text, whole.stop_reason) == (text, None)
    else:
        matched = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (whole.text, whole.stop_reason) == (text[: ends[0] - len(matched)], matched)


def test_a_stop_token_is_a_token_and_no_text() -> None:
    """It is shown, counted and named as the reason, unless it is eos."""
    a, b = (TOKENS.encode(char)[0] for char in "ab")
    for eos, reason in ((frozenset[int](), b), (frozenset({b}), None)):
        text = ChoiceText(0, request_of((), frozenset({b})), TOKENS, eos)
        piece = text.take(delta(0, [a, b], FinishReason.STOP))
        assert (piece.text, piece.tokens, piece.stop_reason) == ("a", (a, b), reason)


def test_what_is_held_back_comes_at_the_end() -> None:
    """A started stop string, and half a character as U+FFFD."""
    half = TOKENS.encode("🙂")[0]
    ids = [TOKENS.encode(char)[0] for char in "aX"]
    text = ChoiceText(0, request_of(("XY",)), TOKENS, frozenset())
    assert text.take(delta(0, ids)).text == "a"
    assert text.take(delta(2, [half], FinishReason.LENGTH)).text == "X\ufffd"


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    piece = ChoiceText(0, request_of(()), None, frozenset()).take(delta(0, [1, 2], FinishReason.LENGTH))
    assert (piece.text, piece.tokens, piece.offsets) == ("", (1, 2), (0, 0))

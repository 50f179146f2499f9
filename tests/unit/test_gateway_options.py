"""What a client may rule out or ask of its prompt, and who shares its cache: read right, or refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.errors import BadRequest
from gateway.model_card import ModelCard
from gateway.validate import Validator
from tests.unit.gateway_world import card_of, write_checkpoint

CONFIG = GatewayConfig(bad_words_max=3, bad_word_chars_max=9, allowed_token_ids_max=4, prompt_logprobs_max=40)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return card_of(write_checkpoint(folder), context=64)


@pytest.fixture(scope="module")
def validator(card: ModelCard) -> Validator:
    return Validator(card, CONFIG, card.context)


def test_a_bad_word_is_meant_with_a_space_before_it_too(validator: Validator, card: ModelCard) -> None:
    """As vLLM has it: where the space makes another token, not one more."""
    assert card.tokens is not None
    encode = card.tokens.encode
    sampling = validator.completion({"prompt": [1], "bad_words": ["brown", "  the", "brown"]}).requests[0].sampling
    expected = []
    for word in ("brown", "the"):
        plain, spaced = encode(word), encode(f" {word}")
        expected.append(tuple(plain))
        if len(plain) == len(spaced) and plain[0] != spaced[0]:
            expected.append(tuple(spaced))
    assert sampling.bad_words == tuple(expected)
    assert len(expected) == 3  # " the" is one token, as "the" is; " brown" is one where "brown" is two
    assert validator.completion({"prompt": [1], "bad_words": []}).requests[0].sampling.bad_words == ()


def test_allowed_ids_come_once_and_in_order(validator: Validator) -> None:
    body = {"prompt": [1], "allowed_token_ids": [9, 3, 9]}
    assert validator.completion(body).requests[0].sampling.allowed_token_ids == (3, 9)
    assert validator.chat({**body, "messages": CHAT}).requests[0].sampling.allowed_token_ids == (3, 9)


def test_a_prompt_is_scored_where_its_logprobs_or_those_of_its_echo_are_wanted(validator: Validator) -> None:
    for fields, wanted, shown in (
        ({}, None, None),
        ({"logprobs": 3}, None, None),
        ({"prompt_logprobs": 0}, 0, 0),
        ({"prompt_logprobs": 4, "logprobs": 1}, 4, 4),
        ({"echo": True}, None, None),
        ({"echo": True, "logprobs": 2}, 2, None),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 5}, 5, 5),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 1}, 2, 1),
    ):
        call = validator.completion({"prompt": [1, 2], **fields})
        assert (call.requests[0].num_prompt_logprobs, call.num_prompt_logprobs) == (wanted, shown)
    assert validator.chat({"messages": CHAT, "prompt_logprobs": 1}).requests[0].num_prompt_logprobs == 1


def test_an_echo_alone_is_a_token_that_nobody_is_shown(validator: Validator) -> None:
    call = validator.completion({"prompt": [1, 2], "echo": True, "max_tokens": 0})
    assert (call.requests[0].max_tokens, call.echo, call.wants_answer) == (1, True, False)


def test_best_of_may_say_what_n_says(validator: Validator) -> None:
    assert validator.completion({"prompt": [1], "n": 3, "best_of": 3}).requests[0].n == 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bad_words": ["a"] * 4}, "bad_words is a list of 4 items; accepted: at most 3 strings"),
    ({"bad_words": ["a", " "]}, r'bad_words\[1\] is " "; accepted: a string of 1 to 9 characters, not of spaces'),
    ({"bad_words": [""]}, r'bad_words\[0\] is ""'),
    ({"bad_words": ["x" * 10]}, r'bad_words\[0\] is "xxx'),
    ({"bad_words": "x"}, 'bad_words is "x"; accepted: a list of strings'),
    ({"bad_words": [7]}, "bad_words is a list of 1 items; accepted: a list of strings"),
    ({"allowed_token_ids": []}, "allowed_token_ids is a list of 0 items; accepted: a list of 1 to 4 token ids"),
    ({"allowed_token_ids": [1, 2, 3, 4, 5]}, "allowed_token_ids is a list of 5 items"),
    ({"allowed_token_ids": [1, 5000]}, r"allowed_token_ids\[1\] is 5000; accepted: a token id from 0 to"),
    ({"allowed_token_ids": ["1"]}, "allowed_token_ids is a list of 1 items"),
    ({"min_tokens": 1, "allowed_token_ids": [7], "stop_token_ids": [7]}, "min_tokens is 1; accepted: nothing,"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1; accepted: an integer of at least 0"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21; accepted: an integer from 0 to 19 for 2 prompt tokens"),
    (
        {"prompt_logprobs": 3, "n": 8},
        "prompt_logprobs is 3; accepted: an integer from 0 to 1 for 16 prompt",
    ),
    ({"logprobs": 20, "echo": True}, "logprobs is 20; accepted: an integer from 0 to 19"),
    ({"prompt_logprobs": 0, "n": 21}, "prompt_logprobs is 0 for 42 prompt tokens, times n; accepted: at most 40"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs is 1; accepted: null, unless stream is false"),
    ({"max_tokens": 0}, "max_tokens is 0; accepted: an integer of at least 1; or 0, with echo: true"),
    ({"best_of": 3, "n": 2}, "best_of is 3, which is not supported here; accepted: null or 2"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_a_wrong_option_is_refused_in_a_sentence(
    validator: Validator, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        validator.completion({"prompt": [1, 2], **change})
    assert str(caught.value.param).startswith(next(iter(change)))


def test_words_that_leave_nothing_that_is_allowed_are_refused(validator: Validator, card: ModelCard) -> None:
    assert card.tokens is not None
    (token,) = card.tokens.encode("x")
    with pytest.raises(BadRequest, match="accepted: words that leave a token of allowed_token_ids"):
        validator.completion({"prompt": [1], "bad_words": ["x"], "allowed_token_ids": [token]})
    bare = Validator(dataclasses.replace(card, tokens=None, template=None), CONFIG, 64)
    with pytest.raises(BadRequest, match="bad_words needs text, but this checkpoint has no tokenizer"):
        bare.completion({"prompt": [1], "bad_words": ["x"]})


def test_chat_has_no_echo_and_no_silent_answer(validator: Validator) -> None:
    for change, sentence in (({"echo": True}, "echo is true"), ({"max_tokens": 0}, "max_tokens is 0")):
        with pytest.raises(BadRequest, match=sentence):
            validator.chat({"messages": CHAT, **change})


def test_users_share_a_cache_unless_told_apart(card: ModelCard) -> None:
    """A given salt is nobody's own: spelling it as another user's leads nowhere."""

    def salt(by: Any, **fields: Any) -> str:
        validator = Validator(card, GatewayConfig(cache_shared_by=by), 64)
        return validator.completion({"prompt": [1], **fields}).requests[0].cache_salt

    ann, bob = {"user": "ann"}, {"user": "bob"}
    assert salt("all", **ann) == salt("all", **bob) == salt("all") == ""
    assert salt("all", **ann, cache_salt="mine") == salt("all", cache_salt="mine") == "mine"
    assert len({salt("user", **ann), salt("user", **bob), salt("user"), ""}) == 4
    assert salt("user", **ann, cache_salt="mine") == salt("user", **bob, cache_salt="mine")
    assert salt("user", cache_salt=salt("user", **bob)) != salt("user", **bob)

"""What a client may ask: every wrong body is a 400 that names the field, the value and what is accepted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies import parse
from gateway.config import GatewayConfig
from gateway.errors import BadRequest, NotFound, NotJson, TooLarge
from gateway.model_card import ModelCard
from gateway.request import Sampling
from gateway.validate import Validator
from tests.unit.gateway_world import card_of, write_checkpoint

CONFIG = GatewayConfig(n_max=8, prompts_max=3, tools_max=2)
CHAT = [{"role": "user", "content": "Hi"}]


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def nested(depth: int) -> dict[str, Any]:
    """A schema with one property, so many alternatives deep."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return {"properties": {"x": schema}}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return card_of(write_checkpoint(folder, temperature=0.7, top_p=0.95, top_k=40), context=64)


@pytest.fixture(scope="module")
def validator(card: ModelCard) -> Validator:
    return Validator(card, CONFIG, card.context)


def test_defaults_are_the_checkpoints_and_openais(validator: Validator, card: ModelCard) -> None:
    (request,) = validator.completion({"prompt": [1, 2]}).requests
    assert dataclasses.replace(request.sampling, seed=0) == Sampling(0.7, 0.95, 40, 0)
    assert (request.max_tokens, request.n, request.num_logprobs, request.priority) == (16, 1, None, 0)
    assert request.stop_token_ids == card.eos
    (request,) = validator.chat({"messages": CHAT}).requests
    assert request.max_tokens == 64 - len(request.prompt)


def test_what_is_given_is_taken(validator: Validator, card: ModelCard) -> None:
    body = {
        "model": "tiny",
        "prompt": [3],
        "max_tokens": 63,
        "n": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "seed": -1,
        "stop": ["b", "a", "b"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 0,
        "priority": -3,
        "cache_salt": "mine",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    call = validator.completion(body)
    (request,) = call.requests
    assert request.sampling == Sampling(0.0, 0.5, 0, 2**64 - 1)
    body = {
        "prompt": [3],
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 2,
        "logit_bias": {"7": -1, "5": 2.5, "6": 0},
        "min_tokens": 4,
    }
    (shaped,) = validator.completion(body).requests
    expected = Sampling(0.7, 0.95, 40, 0, 0.1, 1.1, -0.5, 2.0, ((5, 2.5), (7, -1.0)))
    assert (dataclasses.replace(shaped.sampling, seed=0), shaped.min_tokens) == (expected, 4)
    assert (request.stop, request.stop_token_ids, request.num_logprobs) == (("b", "a"), frozenset({9}), 0)
    assert (call.stream, call.include_usage, call.return_token_ids) == (True, True, True)
    assert (request.max_tokens, request.n, request.priority, request.cache_salt) == (63, 2, -3, "mine")
    call = validator.completion({"prompt": [3], "stop_token_ids": [9], "stop": "x"})
    assert (call.requests[0].stop_token_ids, call.requests[0].stop) == (card.eos | {9}, ("x",))


def test_max_tokens_left_open_never_exceeds_what_the_context_leaves(validator: Validator) -> None:
    """Given, it must fit; left open, it is cut."""
    assert validator.completion({"prompt": [1] * 60}).requests[0].max_tokens == 4
    with pytest.raises(
        TooLarge, match=r"max_tokens is 5; accepted: at most 4, what the 60 tokens of prompt leave"
    ):
        validator.completion({"prompt": [1] * 60, "max_tokens": 5})
    with pytest.raises(TooLarge, match=r"max_completion_tokens is 64"):
        validator.chat({"messages": CHAT, "max_completion_tokens": 64, "max_tokens": 1})


def test_a_prompt_beyond_the_context_names_both_numbers(validator: Validator) -> None:
    with pytest.raises(TooLarge, match=r"prompt has 64 tokens; accepted: at most 63.* context of 64: .* 1 tokens"):
        validator.completion({"prompt": [1] * 64})
    with pytest.raises(TooLarge, match="messages has"):
        validator.chat({"messages": [{"role": "user", "content": "word " * 99}]})


def test_prompts_come_as_text_or_ids_one_or_many(validator: Validator, card: ModelCard) -> None:
    """Each gets its own request, and without a seed its own."""
    assert card.tokens is not None
    ids = card.tokens.encode("hello")
    for prompt, expected in (
        ("hello", [ids]),
        (ids, [ids]),
        (["hello", "a"], [ids, card.tokens.encode("a")]),
        ([ids, [1]], [ids, [1]]),
        (["hello", [1]], [ids, [1]]),
    ):
        requests = validator.completion({"prompt": prompt}).requests
        assert [list(request.prompt) for request in requests] == expected
        assert len({request.request_id for request in requests}) == len(requests)
        assert len({request.sampling.seed for request in requests}) == len(requests)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is null; accepted: a string, a list"),
    ({"prompt": ""}, 'prompt is ""; accepted: at least one character'),
    ({"prompt": []}, "prompt is a list of 0 items"),
    ({"prompt": [[]]}, r"prompt\[0\] is a list of 0 items"),
    ({"prompt": ["a", ""]}, r'prompt\[1\] is ""'),
    ({"prompt": [[1], 2]}, r"prompt\[1\] is 2"),
    ({"prompt": {"a": 1}}, "prompt is an object"),
    ({"prompt": ["a"] * 4}, "prompt is a list of 4 items; accepted: at most 3 prompts"),
    ({"prompt": [1, 2.0]}, r"prompt\[1\] is 2.0; accepted: a token id from 0 to"),
    ({"prompt": [1, True]}, r"prompt\[1\] is true"),
    ({"prompt": [1, -1]}, r"prompt\[1\] is -1"),
    ({"prompt": [1, 1_000_000]}, r"prompt\[1\] is 1000000"),
    ({"max_tokens": 0}, "max_tokens is 0; accepted: an integer of at least 1"),
    ({"max_tokens": "9"}, 'max_tokens is "9"; accepted: an integer'),
    ({"max_tokens": True}, "max_tokens is true"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    ({"n": 0}, "n is 0"),
    ({"n": 9}, "n is 9; accepted: an integer from 1 to 8"),
    ({"temperature": -0.1}, "temperature is -0.1; accepted: a number from 0 to 1000000; 0 is greedy"),
    ({"temperature": "hot"}, 'temperature is "hot"'),
    ({"temperature": float("nan")}, "temperature is NaN"),
    ({"temperature": float("inf")}, "temperature is Infinity"),
    ({"top_p": 0}, "top_p is 0; accepted: a number above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_k": -2}, "top_k is -2"),
    ({"seed": 2**63}, f"seed is {2**63}; accepted: an integer from -2.63"),
    ({"seed": 1.8446744073709552e19}, "seed is 1.8446744073709552e"),
    ({"stop": ["x"] * 1000}, "stop is a list of 1,000 items; accepted: at most 16 strings"),
    ({"stop": [""]}, r'stop\[0\] is ""; accepted: a string of 1 to 256 characters'),
    ({"stop": ["y" * 257]}, r"stop\[0\] is \"yyy.*257 characters"),
    ({"stop": [3]}, "stop is a list of 1 items; accepted: a string or a list of strings"),
    ({"stop_token_ids": [5000]}, r"stop_token_ids\[0\] is 5000"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids is a list of 65 items; accepted: at most 64"),
    ({"logprobs": 21}, "logprobs is 21; accepted: an integer from 0 to 20"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": True}, "logprobs is true"),
    ({"stream_options": {"include_usage": True}}, "stream_options is an object; accepted: nothing, unless stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage is 1"),
    ({"stream": 1}, "stream is 1; accepted: true or false"),
    ({"priority": 2**31}, "priority is 2147483648"),
    ({"cache_salt": ""}, 'cache_salt is ""; accepted: a string of 1 to 256 characters'),
    ({"cache_salt": 7}, "cache_salt is 7"),
    ({"model": 7}, "model is 7"),
    ({"tools": []}, "tools is a list of 0 items, which is not supported here; accepted: null"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1; accepted: a number from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty is -3"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; accepted: a number from 0.01 to 100"),
    ({"min_p": 1.1}, "min_p is 1.1; accepted: a number from 0 to 1"),
    ({"logit_bias": {"5": 101}}, r"logit_bias\.5 is 101; accepted: a number from -100 to 100"),
    ({"logit_bias": [5]}, "logit_bias is a list of 1 items; accepted: an object of token ids, as strings"),
    ({"logit_bias": {"5": "1"}}, r'logit_bias\.5 is "1"'),
    ({"logit_bias": {"5": True}}, r"logit_bias\.5 is true"),
    ({"logit_bias": {"5": float("nan")}}, r"logit_bias\.5 is NaN"),
    ({"logit_bias": {"05": 1}}, 'logit_bias has the key "05"; accepted: token ids from 0 to'),
    ({"logit_bias": {"5000": 1}}, 'logit_bias has the key "5000"'),
    ({"logit_bias": {"x" * 999: 1}}, r'logit_bias has the key "xxx.*999 characters'),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias has 1,025 entries; accepted: at most 1,024"),
    ({"min_tokens": -1}, "min_tokens is -1; accepted: an integer from 0 to max_tokens"),
    ({"min_tokens": 17}, "min_tokens is 17; accepted: an integer from 0 to 16"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; accepted: an integer from 0 to 8"),
    ({"allowed_token_ids": []}, "allowed_token_ids is a list of 0 items; accepted: a list of 1 to 4096"),
    ({"best_of": 2}, "best_of is 2, which is not supported here; accepted: null or 1"),
    ({"echo": 1}, "echo is 1; accepted: true or false"),
    ({"suffix": "x"}, "suffix"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]


@pytest.mark.parametrize(
    ("change", "sentence"), BAD, ids=[next(iter(c)) + f"-{i}" for i, (c, _) in enumerate(BAD)]
)
def test_a_wrong_field_is_refused_in_a_sentence(
    validator: Validator, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        validator.completion({"prompt": [1], **change})
    assert (caught.value.status, caught.value.body()["error"]["type"]) == (400, "invalid_request_error")
    param = next(iter(change))
    assert str(caught.value.param).startswith("stream_options" if "stream_options" in change else param)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": None}, "messages is null"),
        ({"messages": "Hi"}, 'messages is "Hi"; accepted: a list of messages'),
        ({"messages": []}, "messages is a list of 0 items"),
        ({"top_logprobs": 3}, "top_logprobs is 3; accepted: nothing, unless logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; accepted: an integer from 0 to 20"),
        ({"logprobs": 1}, "logprobs is 1; accepted: true or false"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"tools": []}, "tools is a list of 0 items; accepted: a list of 1 to 2 tools"),
        ({"tools": [tool("f"), tool("g"), tool("h")]}, "tools is a list of 3 items"),
        ({"tools": {"f": 1}}, "tools is an object"),
        ({"tools": ["f"]}, r'tools\[0\] is "f"; accepted: an object with type and function'),
        ({"tools": [{"type": "custom"}]}, r'tools\[0\].type is "custom"; accepted: "function"'),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].function is null"),
        ({"tools": [tool('a"b')]}, r"tools\[0\].function.name is"),
        ({"tools": [tool("")]}, r'tools\[0\].function.name is ""; accepted: 1 to 128 characters'),
        ({"tools": [tool("f"), tool("f")]}, r'tools\[1\].function.name is "f"; accepted: a name that no other'),
        ({"tools": [tool("f", parameters=[])]}, r"tools\[0\].function.parameters is a list of 0 items"),
        (
            {"tools": [tool("f", parameters=nested(65))]},
            "nested too deep; accepted: at most 64 levels",
        ),
        ({"tool_choice": "auto"}, 'tool_choice is "auto"; accepted: null or "none", unless tools are given'),
        ({"tools": [tool("f")], "tool_choice": "must"}, 'tool_choice is "must"; accepted: none, auto, required'),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice is an object"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is 1; accepted: true or false"),
    ],
)
def test_a_wrong_chat_field_is_refused_in_a_sentence(
    validator: Validator, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence):
        validator.chat({"messages": CHAT, **change})


def test_tools_are_shown_to_the_template_unless_the_choice_is_none(tmp_path: Path, card: ModelCard) -> None:
    """As the client described them; a schema's kinds go to the parser, `strict` is named as ignored."""
    source = "{% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}!"
    shown = Validator(card_of(write_checkpoint(tmp_path, source)), CONFIG, 512)
    assert card.tokens is not None
    described = tool("f", description="ü", parameters={"properties": {"x": {"type": "integer"}}}, strict=True)
    for choice, text in ((None, json.dumps(described["function"], ensure_ascii=False) + "!"), ("none", "!")):
        call = shown.chat({"messages": CHAT, "tools": [described], "tool_choice": choice})
        assert card.tokens.decode(list(call.requests[0].prompt)) == text
        assert [(one.name, one.kinds) for one in call.tools] == ([] if choice else [("f", {"x": {"integer"}})])
        assert call.ignored == (() if choice else ("tools.strict",))
    assert shown.chat({"messages": CHAT, "tools": None, "tool_choice": "none"}).tools == ()


def test_a_tokenizer_without_tags_refuses_tools_by_name(card: ModelCard) -> None:
    bare = Validator(dataclasses.replace(card, tags=None), CONFIG, 64)
    with pytest.raises(BadRequest, match="tokenizer has no <minimax:tool_call>; accepted: null"):
        bare.chat({"messages": CHAT, "tools": [tool("f")]})


def test_chat_logprobs(validator: Validator) -> None:
    """true alone: the sampled token's; with top_logprobs: and so many alternatives."""
    for fields, expected in (({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 5}, 5)):
        assert validator.chat({"messages": CHAT, **fields}).requests[0].num_logprobs == expected


def test_an_unknown_model_is_not_found(validator: Validator) -> None:
    with pytest.raises(NotFound, match='model is "gpt-9"; accepted: tiny') as caught:
        validator.completion({"prompt": [1], "model": "gpt-9"})
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_neutral_values_pass_and_unknown_fields_are_named(validator: Validator) -> None:
    """A client that spells out the defaults is not turned away; what nobody reads is reported."""
    neutral = {
        "presence_penalty": 0.0,
        "logit_bias": {},
        "min_tokens": 0,
        "echo": False,
        "best_of": 1,
        "tools": None,
        "response_format": {"type": "text"},
        "max_tokens": None,
        "stop": None,
        "temperature": None,
    }
    assert validator.completion({"prompt": [1], **neutral, "metadata": {}, "foo": 1}).ignored == (
        "metadata",
        "foo",
    )


def test_a_checkpoint_without_a_tokenizer_refuses_text_by_name(card: ModelCard) -> None:
    bare = Validator(dataclasses.replace(card, tokens=None, template=None), CONFIG, 64)
    assert bare.completion({"prompt": [1, 2]}).requests[0].prompt == (1, 2)
    with pytest.raises(BadRequest, match=r"prompt needs text, but this checkpoint has no tokenizer.json"):
        bare.completion({"prompt": "hello"})
    with pytest.raises(BadRequest, match=r"stop needs text, but this checkpoint has no tokenizer.json"):
        bare.completion({"prompt": [1], "stop": "x"})
    with pytest.raises(BadRequest, match=r"messages cannot be read: this checkpoint has no tokenizer.json"):
        bare.chat({"messages": CHAT})
    with pytest.raises(BadRequest, match="has no chat template"):
        Validator(dataclasses.replace(card, template=None), CONFIG, 64).chat({"messages": CHAT})


def test_a_temperature_too_small_to_divide_by_is_greedy(validator: Validator) -> None:
    for given_temperature, used in ((1e-30, 0.0), (1e-4, 1e-4)):
        body = {"prompt": [1], "temperature": given_temperature}
        assert validator.completion(body).requests[0].sampling.temperature == used


@pytest.mark.parametrize(
    ("raw", "content_type", "error", "sentence"),
    [
        (b"{", "application/json", BadRequest, "not valid JSON"),
        (b"\xff", "application/json", BadRequest, "not valid JSON"),
        (b'{"temperature": NaN}', "application/json", BadRequest, "not valid JSON"),
        (b"[" * 100_000, "application/json", BadRequest, "not valid JSON"),
        (b"[1]", "application/json", BadRequest, "the body is a list of 1 items; accepted: a JSON object"),
        (b"{}", "text/plain", NotJson, 'content-type is "text/plain"; accepted: application/json'),
    ],
)
def test_what_is_no_json_object_is_refused(
    raw: bytes, content_type: str, error: type[BadRequest], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        parse(raw, content_type)
    assert parse(b"{}", "application/json; charset=utf-8") == parse(b"{}", "") == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    [
        "prompt",
        "messages",
        "model",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "tool_choice",
        "parallel_tool_calls",
        "seed",
        "stop",
        "stream",
        "stop_token_ids",
        "ignore_eos",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "tools",
        "echo",
        "priority",
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=4), st.booleans())
def test_no_body_whatever_raises_anything_but_a_refusal(
    validator: Validator, body: dict[str, Any], is_chat: bool
) -> None:
    """Nor a message that is not JSON, or too long to read."""
    try:
        _ = (
            validator.chat({"messages": CHAT, **body})
            if is_chat
            else validator.completion({"prompt": [1], **body})
        )
    except BadRequest as error:
        message = json.dumps(error.body())
    else:
        message = ""
    assert len(message) < 600

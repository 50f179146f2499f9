"""What answers are held to: which grammar a request becomes, and how those that cannot be are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest

import model.synthetic_tokenizer
from attention_workers import guides
from gateway import grammar_process
from gateway.config import GatewayConfig
from gateway.errors import BadRequest
from gateway.model_card import ModelCard
from gateway.request import FinishReason, GenerateRequest
from gateway.validate import Validator
from tests.unit.answers import calls, read
from tests.unit.gateway_world import card_of, tokenizer_json, write_checkpoint

USER = {"role": "user", "content": "Hi"}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
DEFINITIONS = {
    "$defs": {"pair": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2}}
}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["C", "F"]},
        "code": {"type": "string", "pattern": "^[a-c/]{2}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "maybe": {"type": ["string", "null"], "maxLength": 4},
        "pair": {"$ref": "#/$defs/pair"},
        "opts": SCHEMA,
    },
    "required": ["city", "days"],
    **DEFINITIONS,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
UNNAMEABLE = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a<b": {}}}}}


def named(tool: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool}}


def by_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    template = Path(model.synthetic_tokenizer.CHAT_TEMPLATE).read_text()
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), template), context=4096)


@pytest.fixture(scope="module")
def validator(card: ModelCard) -> Validator:
    return Validator(card, GatewayConfig(grammar_s_max=1.0), 4096)


def chat(validator: Validator, **fields: Any) -> GenerateRequest:
    return validator.chat({"messages": [USER], **fields}).requests[0]


def walks(card: ModelCard, text: str, count: int = 20) -> Iterator[list[int]]:
    """Token sequences, each drawn at random from what the grammar allows, up to its end."""
    eos = sorted(card.eos)
    tokens = llguidance.LLTokenizer(tokenizer_json(), n_vocab=card.vocab_size, eos_token=eos)
    whole = llguidance.LLMatcher(tokens, text, log_level=0)
    assert not whole.is_error(), whole.get_error()
    for seed in range(count):
        chance, matcher, ids = random.Random(seed), whole.deep_copy(), list[int]()
        while True:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            ids.append(int(chance.choice(np.flatnonzero(bits))))
            if ids[-1] in eos:
                break
            assert matcher.consume_token(ids[-1])
        yield ids[:-1]


# --- which grammar ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1, null]}', "[1]"),
        (by_schema(SCHEMA), '{"a": true}', "{}"),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a": false}', '{"a": 1}'),
        ({"structured_outputs": {"json_object": True, "regex": None}}, "{}", "1"),
        ({"structured_outputs": {"regex": "[a-c]+/x"}}, "ab/x", "ab"),
        ({"structured_outputs": {"choice": ["yes", 'n"o\n']}}, 'n"o\n', "n"),
        ({"structured_outputs": {"grammar": 'start: "a" b+\nb: "c"'}}, "acc", "a"),
        ({"guided_json": json.dumps(SCHEMA)}, '{"a": true}', "null"),
        ({"guided_regex": "x|/y\n"}, "/y\n", "y"),
        ({"guided_choice": ["only"]}, "only", "onl"),
        ({"guided_grammar": 'start: /[0-9]{2}/'}, "42", "4"),
    ],
)  # fmt: skip
def test_every_spelling_becomes_a_grammar_of_its_text(
    card: ModelCard, validator: Validator, fields: dict[str, Any], accepted: str, refused: str
) -> None:
    """Of the whole text for completions, of what follows the thought for chat."""
    (request,) = validator.completion({"prompt": "x", **fields}).requests
    assert card.tokens is not None
    for held, before in ((request.grammar, ""), (chat(validator, **fields).grammar, "\n\n")):
        assert held is not None
        tokens = llguidance.LLTokenizer(tokenizer_json(), n_vocab=card.vocab_size, eos_token=sorted(card.eos))
        for text, is_accepted in ((before + accepted, True), (before + refused, False)):
            matcher = llguidance.LLMatcher(tokens, held.text, log_level=0)
            went = matcher.consume_tokens(tokens.tokenize_str(text)) and matcher.is_accepting()
            assert went is is_accepted, text


def test_a_thought_comes_first_and_leaves_room(card: ModelCard, validator: Validator) -> None:
    """Half of max_tokens, or the budget; what would end it otherwise is barred (vLLM #44269: no end)."""
    assert card.tags is not None
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 100}
    held = chat(validator, **fields).grammar
    assert held is not None
    assert held.thought_tokens_max == 50
    assert held.thought_ends[0] == card.tags.think_end
    assert set(held.barred) == {*card.eos, card.tags.calls}
    held = chat(validator, **fields, thinking_token_budget=7).grammar
    assert held is not None
    assert held.thought_tokens_max == 7
    alone = chat(validator, thinking_token_budget=0).grammar
    assert alone is not None
    assert (alone.text, alone.barred, alone.thought_tokens_max) == ("", (), 0)
    assert chat(validator, response_format={"type": "text"}).grammar is None


def answers_of(
    card: ModelCard, validator: Validator, count: int = 30, **fields: Any
) -> Iterator[tuple[str, list[Any]]]:
    """Content and calls of answers that the grammar allows, as the parser reads them."""
    assert card.tags is not None
    call = validator.chat({"messages": [USER], "tools": TOOLS, **fields})
    held = call.requests[0].grammar
    assert held is not None
    tools = {tool.name: tool.kinds for tool in call.tools}
    for ids in walks(card, held.text, count):
        out, parser = read([card.tags.think_end, *ids], tools, finish=FinishReason.STOP)
        made = calls(out)
        assert parser.num_calls == len(made)
        yield out.content, [(name, json.loads(arguments)) for name, arguments in made]


def test_a_required_call_is_one_that_the_parser_reads_and_the_schema_allows(
    card: ModelCard, validator: Validator
) -> None:
    """With a thought before it, and nothing beside it (Dynamo #11554)."""
    seen: set[str] = set()
    for content, made in answers_of(card, validator, tool_choice="required"):
        assert content == ""
        assert made
        for name, arguments in made:
            seen |= {name, *arguments}
            jsonschema.validate(arguments, PARAMETERS if name == "weather" else {"maxProperties": 0})
    assert seen == {"weather", "now", *PARAMETERS["properties"]}


def test_a_named_tool_is_called_once(card: ModelCard, validator: Validator) -> None:
    for content, made in answers_of(
        card, validator, 5, tool_choice=named("now"), response_format={"type": "json_object"}
    ):
        assert (content, made) == ("", [("now", {})])
    for _, made in answers_of(card, validator, 10, tool_choice="required", parallel_tool_calls=False):
        assert len(made) == 1


def test_a_response_format_beside_tools_is_for_answers_that_call_none(
    card: ModelCard, validator: Validator
) -> None:
    found = list(answers_of(card, validator, **by_schema(SCHEMA)))
    assert {bool(made) for _, made in found} == {True, False}
    for content, made in found:
        assert (content == "") if made else json.loads(content)["a"] in (True, False)


def test_strict_is_ignored_by_name_only_where_nothing_holds_to_it(validator: Validator) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    body = {"messages": [USER], "tools": [tool]}
    assert validator.chat(body).ignored == ("tools.strict",)
    assert validator.chat({**body, "tool_choice": "required"}).ignored == ()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"response_format": "json"}, "response_format", "accepted: {"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "name and schema"),
        (by_schema(3), "response_format.json_schema.schema", "JSON Schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex", "one constraint"),
        ({"guided_choice": []}, "guided_choice", "1 to 1024 strings"),
        ({"guided_choice": [1]}, "guided_choice", "1 to 1024 strings"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "cannot be held to: .*look-around"),
        ({"guided_regex": "("}, "guided_regex", "cannot be held to"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "cannot be held to"),
        ({"guided_json": {"type": "nothing"}}, "guided_json", "cannot be held to"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "cannot be held to: Unimplemented"),
        ({"guided_json": {"$ref": "http://example.org/s"}}, "guided_json", "cannot be held to"),
        ({"guided_json": False}, "guided_json", "JSON Schema"),
        ({"guided_json": {"type": "object"}, "ignore_eos": True}, "ignore_eos", "how the answer ends"),
        ({"tools": TOOLS, "tool_choice": "must"}, "tool_choice", "auto, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "auto, required"),
        ({"tools": TOOLS, "tool_choice": named("rm")}, "tool_choice.function.name", "weather, now"),
        ({"tool_choice": "required"}, "tool_choice", "unless tools are given"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "at least 0"),
        ({"tools": [UNNAMEABLE], "tool_choice": "required"}, "tools.f.parameters.properties", "angle brackets"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused_by_name(
    validator: Validator, fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        chat(validator, **fields)
    assert caught.value.param == param


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": ["x" * 100] * 1000},
        {"guided_json": nested(900)},
        {"guided_grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000},
        {"guided_regex": "(" * 9000 + "a" + ")" * 9000},
        {"guided_regex": "(a{1000}b){1000}" * 200},
        {"guided_grammar": "start: A\nA: " + " & ".join(f"/(?s:.*){i}(?s:.*)/" for i in range(400))},
        {"guided_json": {"type": "integer", "multipleOf": 999983, "minimum": 1}},
    ],
    ids=["large", "deep", "parentheses", "nested regex", "repeats", "intersections", "multiples"],
)  # fmt: skip
def test_a_huge_grammar_is_refused_within_its_time(validator: Validator, fields: dict[str, Any]) -> None:
    """However long compiling it would take: its process is ended. The next one is compiled by another."""
    began_s = time.monotonic()
    with pytest.raises(BadRequest, match=r"accepted: at most 65,536|cannot be held to"):
        chat(validator, **fields)
    assert time.monotonic() - began_s < 15  # of which half a second is a fresh process
    assert chat(validator, guided_regex="a").grammar is not None


def test_a_compiler_that_was_killed_is_begun_anew(card: ModelCard, validator: Validator) -> None:
    assert chat(validator, guided_regex="[a-b]").grammar is not None
    assert card.judge is not None
    process = card.judge._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert chat(validator, guided_regex="[b-c]").grammar is not None


def test_without_a_tokenizer_nothing_can_be_held_to(card: ModelCard) -> None:
    bare = Validator(dataclasses.replace(card, judge=None), GatewayConfig(), 64)
    with pytest.raises(BadRequest, match=r"guided_regex cannot be held to: .*no tokenizer\.json"):
        bare.completion({"prompt": [1], "guided_regex": "a"})


def test_gateways_judge_by_the_bounds_of_workers() -> None:
    """Else a worker would give up what a gateway let in."""
    names = [name for name in dir(guides.LIMITS) if not name.startswith("_")]
    assert [getattr(guides.LIMITS, name) for name in names] == [
        getattr(grammar_process.LIMITS, name) for name in names
    ]

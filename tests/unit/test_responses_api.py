"""OpenAI's Responses API over a real socket, as openai's client reads it: whole, streamed, sent back, refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from gateway.config import GatewayConfig
from gateway.errors import BadRequest, Overloaded
from gateway.model_card import ModelCard
from gateway.responses.body import call_of
from gateway.validate import Validator
from tests.unit.gateway_world import EchoEngine, serving
from tests.unit.turns import ANSWER, ARGUMENTS, CONTEXT, PARAMETERS, THOUGHT, thinking_card, tokens_of

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": PARAMETERS,
    "strict": None,
}
ASKED: dict[str, Any] = {"model": "tiny", "input": "Weather in Köln?"}
WHOLE = [("reasoning", THOUGHT), ("message", "Let me look."), *(("function_call", one) for one in ARGUMENTS)]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return thinking_card(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def validator(card: ModelCard) -> Validator:
    return Validator(card, GatewayConfig(), CONTEXT)


@asynccontextmanager
async def asking(card: ModelCard, says: str = "", **limits: Any) -> AsyncIterator[tuple[EchoEngine, AsyncOpenAI]]:
    """An engine that says this, and OpenAI's client of the gateway before it."""
    async with serving(card, **limits) as (_, engine, url):
        engine.says = tokens_of(card, says) if says else None
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield engine, client


def shown(response: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, json.loads(item.arguments) if item.status == "completed" else item.arguments))
        else:
            found.append((item.type, "".join(part.text for part in item.content)))
    return found


async def test_a_response_has_reasoning_a_message_and_calls(card: ModelCard) -> None:
    async with asking(card, ANSWER) as (engine, client):
        engine.cached = {0: 7}
        answer = await client.responses.create(
            **ASKED, tools=[TOOL], metadata={"run": "7"}, instructions="Be brief."
        )
    Response.model_validate(json.loads(answer.model_dump_json(by_alias=True)), strict=True)
    assert shown(answer) == WHOLE
    assert answer.output_text == "Let me look."
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.id.startswith("resp_")
    assert {item.status for item in answer.output} == {"completed"}  # type: ignore[union-attr]
    assert len({item.id for item in answer.output}) == 4
    assert (answer.metadata, answer.instructions, answer.store) == ({"run": "7"}, "Be brief.", False)  # type: ignore[attr-defined]
    assert (answer.temperature, answer.top_p, answer.parallel_tool_calls) == (0.0, 1.0, True)
    assert answer.tools[0].name == "weather"  # type: ignore[union-attr]
    usage = answer.usage
    assert usage is not None
    assert engine.says is not None
    assert (usage.input_tokens, usage.output_tokens) == (len(engine.submissions[0].prompt), len(engine.says) + 1)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 7
    assert usage.output_tokens_details.reasoning_tokens == len(tokens_of(card, THOUGHT + "\n"))


async def test_a_stream_says_the_same_by_openais_own_reckoning(card: ModelCard) -> None:
    """Its accumulator, which is strict about names and places; a worker lost within a call is not seen."""
    async with asking(card, ANSWER) as (engine, client):
        engine.deaths = {3, len(tokens_of(card, ANSWER)) - 9}
        async with client.responses.stream(**ASKED, tools=[TOOL]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        whole = await client.responses.create(**ASKED, tools=[TOOL])
    assert shown(final) == shown(whole) == WHOLE
    assert final.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == "completed"
    assert [kinds.count(f"output_item.{what}") for what in ("added", "done")] == [4, 4]
    assert [kinds.count(f"content_part.{what}") for what in ("added", "done")] == [2, 2]
    for kind, part in (("reasoning_text", THOUGHT), ("output_text", "Let me look.")):
        deltas = [event.delta for event in events if event.type == f"response.{kind}.delta"]  # type: ignore[union-attr]
        (done,) = [event.text for event in events if event.type == f"response.{kind}.done"]  # type: ignore[union-attr]
        assert ("".join(deltas), done, len(deltas) > 3) == (part, part, True)
    first = [e.delta for e in events if e.type == "response.function_call_arguments.delta" and e.output_index == 2]
    assert json.loads("".join(first)) == ARGUMENTS[0]
    assert len(first) > 10
    done_items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done_items] == [item.id for item in final.output]


async def test_the_bytes_of_a_stream(card: ModelCard) -> None:
    """Each event has its type for a name, and nothing follows the last."""
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, "</think>\n\nHi")
        body = {**ASKED, "stream": True, "foo": 1, "reasoning": {"effort": "high"}, "text": {"verbosity": "low"}}
        answer = await client.post(f"{url}/v1/responses", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-expertmesh-ignored-fields"] == "foo, reasoning.effort, text.verbosity"
    events = [block.split("\n") for block in answer.text.removesuffix("\n\n").split("\n\n")]
    payloads = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [payload["type"] for payload in payloads]
    assert payloads[0]["response"]["status"] == "in_progress"
    assert payloads[0]["response"]["usage"] is None
    assert payloads[-1]["response"]["output"][0]["content"][0]["text"] == "Hi"


@pytest.mark.parametrize("keeps", ["content", "encrypted_content"])
async def test_a_conversation_goes_on_where_it_was(card: ModelCard, keeps: str) -> None:
    """The output, sent back with the calls' outputs in any order, is in the next prompt exactly as it was.

    Some clients keep no more of a thought than what is sealed.
    """
    async with asking(card, ANSWER) as (engine, client):
        first = await client.responses.create(**ASKED, tools=[TOOL], include=["reasoning.encrypted_content"])
        items = [item.model_dump(mode="json") for item in first.output]
        items[0] = {key: items[0][key] for key in ("id", "type", "summary", keeps)}
        outputs = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": text}
            for item, text in zip(items[:1:-1], ("no city", [{"type": "input_text", "text": "sun"}]), strict=True)
        ]
        history: Any = [{"role": "user", "content": ASKED["input"]}, *items, *outputs]
        await client.responses.create(model="tiny", input=history, tools=[TOOL])
    before, after = (submission.prompt for submission in engine.submissions)
    assert engine.says is not None
    assert card.tokens is not None
    assert after[: len(before) + len(engine.says) + 1] == (*before, *engine.says, engine.eos)
    assert "<response>sun</response>\n<response>no city</response>" in card.tokens.spelled(list(after))


async def test_input_of_every_kind_is_the_chats(card: ModelCard) -> None:
    """The same prompt and the same wishes as chat makes of the same."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
    named_schema = {"name": "n", "schema": schema}
    function = {"name": "weather", "parameters": TOOL["parameters"]}
    part = {"type": "input_text", "text": "Hi"}
    user = {"role": "user", "content": "Hi"}
    named = {"type": "function", "name": "weather"}
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"input": "Hi"}, {"messages": [user]}),
        ({"input": [{"role": "user", "content": [part]}]}, {"messages": [user]}),
        (
            {"input": [{"type": "message", "role": "developer", "content": "c"}, user], "instructions": "b"},
            {"messages": [{"role": "system", "content": "b"}, {"role": "developer", "content": "c"}, user]},
        ),
        (
            {"input": "Hi", "tools": [TOOL], "tool_choice": named, "parallel_tool_calls": False},
            {
                "messages": [user],
                "tools": [{"type": "function", "function": function}],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
            },
        ),
        (
            {"input": "Hi", "text": {"format": {"type": "json_schema", **named_schema, "strict": True}}},
            {"messages": [user], "response_format": {"type": "json_schema", "json_schema": named_schema}},
        ),
        (
            {"input": "Hi", "text": {"format": {"type": "json_object"}}, "thinking_token_budget": 4},
            {"messages": [user], "response_format": {"type": "json_object"}, "thinking_token_budget": 4},
        ),
        ({"input": "Hi", "reasoning": {"effort": "none"}}, {"messages": [user], "thinking_token_budget": 0}),
        (
            {"input": "Hi", "safety_identifier": "ann", "seed": 3, "temperature": 1.0, "priority": 2},
            {"messages": [user], "user": "ann", "seed": 3, "temperature": 1.0, "priority": 2},
        ),
    ]  # fmt: skip
    async with serving(card) as (_, engine, url), httpx.AsyncClient(base_url=url) as client:
        for ours, theirs in pairs:
            for path, body in (
                ("responses", {**ours, "max_output_tokens": 9}),
                ("chat/completions", {**theirs, "max_tokens": 9}),
            ):
                answer = await client.post(f"/v1/{path}", json=body)
                assert answer.status_code == 200, answer.text
    found = [
        (
            s.grammar,
            s.tenant,
            s.priority,
            s.prompt,
            s.max_tokens,
            s.sampling if "seed" in pairs[i // 2][0] else None,
        )
        for i, s in enumerate(engine.submissions)
    ]
    assert found[::2] == found[1::2]


ENDINGS: list[tuple[dict[str, Any], str, Any, tuple[str, str | None]]] = [
    ({}, "t</think>\n\nHi", [("reasoning", "t"), ("message", "Hi")], ("completed", None)),
    ({"max_output_tokens": 1}, "t t t", [("reasoning", "t")], ("incomplete", "max_output_tokens")),
    ({"reasoning": {"effort": "none"}}, "</think>\n\nHi", [("message", "Hi")], ("completed", None)),
    ({"tools": [TOOL], "parallel_tool_calls": False}, ANSWER, WHOLE[:3], ("completed", None)),
    (
        {"tools": [TOOL], "max_output_tokens": 120},
        '</think>\n\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="days">2</parameter>\n'
        f'<parameter name="city">{"K" * 200}',
        [("function_call", '{"days": 2, "city": "KKK')],
        ("incomplete", "max_output_tokens"),
    ),
]  # fmt: skip


async def test_how_an_answer_ends_and_what_of_it_is_shown(card: ModelCard) -> None:
    """Whole and streamed alike; what was cut is said to be incomplete."""
    async with asking(card) as (engine, client):
        for fields, says, output, (status, reason) in ENDINGS:
            engine.says = tokens_of(card, says)
            answer = await client.responses.create(**ASKED, **fields)
            stream = await client.responses.create(**ASKED, **fields, stream=True)
            *_, last = [event async for event in stream]
            assert last.type == f"response.{status}"
            for one in (answer, last.response):
                found = shown(one)
                if status == "incomplete" and found[-1][0] == "function_call":
                    found[-1] = (found[-1][0], found[-1][1][: len(output[-1][1])])
                assert found == output
                assert (one.status, one.incomplete_details and one.incomplete_details.reason) == (status, reason)
                assert one.output[-1].status == status


async def test_an_answer_is_parsed_by_openais_client(card: ModelCard) -> None:
    class Weather(BaseModel):
        city: str
        days: int

    async with asking(card, 't\n</think>\n\n{"city": "Köln", "days": 2}') as (engine, client):
        answer = await client.responses.parse(**ASKED, text_format=Weather)
    assert answer.output_parsed == Weather(city="Köln", days=2)
    assert engine.submissions[0].grammar is not None


async def test_a_failure_in_a_stream_is_its_last_event(card: ModelCard) -> None:
    async with asking(card, "one two three four") as (engine, client):
        engine.failure_at = 6
        stream = await client.responses.create(**ASKED, stream=True)
        *_, last = [event async for event in stream]
        engine.refusal = Overloaded("the queue is full", retry_after_s=2)
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            await client.responses.create(**ASKED, stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "no expert at <path>")


REASONING = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input": None}, "input is null; accepted: a string, or a list of at least one item"),
        ({"input": []}, "input is a list of 0 items"),
        ({"input": ["x"]}, 'input[0] is "x"; accepted: an item'),
        (
            {"input": [{"type": "item_reference", "id": "i"}]},
            'input[0].type is "item_reference"; accepted: message,',
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, 'input[0].role is "robot"'),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            'input[0].content[0] is "input_image"',
        ),
        ({"input": [{"role": "assistant", "content": "x"}]}, "an answer is not continued"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
            'accepted: a function_call_output for each function_call, "c" too',
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]},
            'input[0].arguments is "x"; accepted: a JSON object',
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            'input[0].call_id is "c"; accepted: the call_id of a function_call before it',
        ),
        ({"store": True}, "store is true, which is not supported here; accepted: null or false"),
        ({"previous_response_id": "resp_1"}, 'previous_response_id is "resp_1", which is not supported here'),
        ({"conversation": "c"}, "conversation is"),
        ({"background": True}, "background is true"),
        ({"truncation": "auto"}, 'truncation is "auto"'),
        ({"include": ["message.output_text.logprobs"]}, "include is"),
        ({"tools": [{"type": "web_search"}]}, 'tools[0].type is "web_search"; accepted: "function"'),
        ({"tools": [{"type": "function", "name": "a b"}]}, 'tools[0].name is "a b"'),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, 'tool_choice.name is "g"'),
        ({"tool_choice": {"type": "allowed_tools"}}, 'tool_choice.type is "allowed_tools"'),
        ({"tool_choice": "required"}, "unless tools are given"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": 3}}}, "text.format.schema is 3"),
        ({"text": {"format": {"type": "xml"}}}, 'text.format.type is "xml"'),
        ({"max_output_tokens": 9999}, "max_output_tokens is 9999; accepted: at most"),
        ({"input": "word " * 3000}, "input has "),
        ({"metadata": {"a": 3}}, "metadata.a is 3; accepted: an object of at most 16 strings"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort is 3"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_what_is_wrong_is_said_in_this_apis_names(
    validator: Validator, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        call_of(validator, {**ASKED, **fields})
    assert sentence in caught.value.message
    assert caught.value.param is not None
    assert caught.value.message.startswith(caught.value.param)


def test_what_cannot_be_read_is_left_out_by_name(validator: Validator) -> None:
    call = call_of(
        validator, {**ASKED, "input": [REASONING, {"role": "user", "content": "x"}], "prompt_cache_key": "k"}
    )
    assert call.ignored == ("prompt_cache_key", "input.encrypted_content")
    named = call_of(validator, {**ASKED, "include": ["web_search_call.results"], "reasoning": {"summary": "auto"}})
    assert named.ignored == ("reasoning.summary", "include.web_search_call.results")

"""Anthropic's Messages API over a real socket, as its own client reads it: whole, streamed, sent back, refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message

from gateway.errors import NotReady, Overloaded
from gateway.messages.dialect import complete_ones
from gateway.model_card import ModelCard
from tests.unit.gateway_world import EchoEngine, serving
from tests.unit.turns import ANSWER, ARGUMENTS, CALL, THOUGHT, thinking_card, tokens_of
from tests.unit.turns import ANTHROPIC_TOOL as TOOL
from tests.unit.turns import ANTHROPIC_USER as USER


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return thinking_card(tmp_path_factory.mktemp("checkpoint"))


@asynccontextmanager
async def asking(
    card: ModelCard, says: str = "", **limits: Any
) -> AsyncIterator[tuple[EchoEngine, AsyncAnthropic]]:
    """An engine that says this, and Anthropic's client of the gateway before it."""
    async with serving(card, **limits) as (_, engine, url):
        engine.says = tokens_of(card, says) if says else None
        async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            yield engine, client


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 1000, "messages": [USER], **fields}


def shown(content: Any) -> list[tuple[str, Any]]:
    values = {"thinking": "thinking", "text": "text", "tool_use": "input"}
    return [(block.type, getattr(block, values[block.type])) for block in content]


WHOLE = [("thinking", THOUGHT), ("text", "Let me look."), *(("tool_use", value) for value in ARGUMENTS)]


async def test_a_message_has_thought_text_and_tools_to_use(card: ModelCard) -> None:
    async with asking(card, ANSWER) as (engine, client):
        engine.cached = {0: 7}
        answer = await client.messages.create(**asked(tools=[TOOL]))
    Message.model_validate(answer.model_dump(), strict=True)
    assert shown(answer.content) == WHOLE
    assert (answer.stop_reason, answer.stop_sequence, answer.model) == ("tool_use", None, "tiny")
    assert answer.id.startswith("msg_")
    assert engine.says is not None
    usage = answer.usage
    assert usage.input_tokens + 7 == len(engine.submissions[0].prompt)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (7, 0)
    assert usage.output_tokens == len(engine.says) + 1
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == len(tokens_of(card, THOUGHT + "\n"))


async def test_a_stream_says_the_same_by_anthropics_own_reckoning(card: ModelCard) -> None:
    """Event by event as they document it; a worker lost within a call is not seen."""
    async with asking(card, ANSWER) as (engine, client):
        engine.cached = {0: 7}
        engine.deaths = {3, len(tokens_of(card, ANSWER)) - 9}
        async with client.messages.stream(**asked(tools=[TOOL])) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_message()
        whole = await client.messages.create(**asked(tools=[TOOL]))
    assert shown(final.content) == WHOLE
    assert final.usage == whole.usage
    assert (final.stop_reason, final.content[0]) == ("tool_use", whole.content[0])
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert [kinds.count(f"content_block_{what}") for what in ("start", "stop")] == [4, 4]
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 2]  # type: ignore[union-attr]
    assert len(pieces) > 10
    assert json.loads("".join(pieces)) == ARGUMENTS[0]


async def test_the_bytes_of_a_stream(card: ModelCard) -> None:
    """Each event has its type for a name, a ping comes first, and nothing follows the last."""
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, "</think>\n\nHi")
        answer = await client.post(f"{url}/v1/messages", json=asked(stream=True, top_k=1, foo=1))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-expertmesh-ignored-fields"] == "foo"
    events = [block.split("\n") for block in answer.text.removesuffix("\n\n").split("\n\n")]
    payloads = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [payload["type"] for payload in payloads]
    assert payloads[1] == {"type": "ping"}
    assert payloads[0]["message"]["content"] == []
    assert payloads[2]["content_block"] == {"type": "text", "text": "", "citations": None}
    assert payloads[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


async def test_a_conversation_goes_on_where_it_was(card: ModelCard) -> None:
    """The answer, sent back with its tools' results in any order, is in the next prompt as it was generated."""
    async with asking(card, ANSWER) as (engine, client):
        first = await client.messages.create(**asked(tools=[TOOL]))
        one, two = (block.id for block in first.content if block.type == "tool_use")
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": two, "content": "no city", "is_error": True},
            {"type": "tool_result", "tool_use_id": one, "content": [{"type": "text", "text": "sun"}]},
            {"type": "text", "text": "Go on."},
        ]
        history: list[Any] = [
            USER,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": results},
        ]
        await client.messages.create(**asked(tools=[TOOL], messages=history))
    assert card.tokens is not None
    _, after = (card.tokens.spelled(list(submission.prompt)) for submission in engine.submissions)
    said = ANSWER.partition("\n</think>\n\n")[2]  # the thought is over with the next question
    results_said = "<response>sun</response>\n<response>Error: no city</response>"
    assert f"]~b]ai\n{said}[e~[\n]~b]tool\n{results_said}[e~[\n]~b]user\nGo on." in after


async def test_a_turn_of_tools_alone_keeps_its_thought(card: ModelCard) -> None:
    """As the template wants it until the next question: interleaved thinking."""
    async with asking(card, ANSWER) as (engine, client):
        first = await client.messages.create(**asked(tools=[TOOL]))
        results = [
            {"type": "tool_result", "tool_use_id": block.id} for block in first.content if block.type == "tool_use"
        ]
        history: list[Any] = [
            USER,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": results},
        ]
        await client.messages.create(**asked(tools=[TOOL], messages=history))
    before, after = (submission.prompt for submission in engine.submissions)
    assert engine.says is not None
    assert after[: len(before) + len(engine.says) + 1] == (*before, *engine.says, engine.eos)


async def test_system_comes_as_text_or_blocks_and_tools_are_the_chats(card: ModelCard) -> None:
    """The same prompt as chat makes of the same."""
    blocks = [
        {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "brief"},
    ]
    function = {"name": "weather", "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    chat = {
        "messages": [{"role": "system", "content": "Be\nbrief"}, USER],
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 3,
    }
    async with serving(card) as (_, engine, url), httpx.AsyncClient(base_url=url) as client:
        for system in ("Be\nbrief", blocks):
            body = asked(system=system, tools=[TOOL], max_tokens=3)
            assert (await client.post("/v1/messages", json=body)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        body = asked(
            tools=[TOOL],
            tool_choice={"type": "none"},
            max_tokens=3,
            messages=[{"role": "system", "content": "x"}, USER],
        )
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    prompts = [submission.prompt for submission in engine.submissions]
    assert prompts[0] == prompts[1] == prompts[2]
    assert card.tokens is not None
    assert "weather" not in card.tokens.spelled(list(prompts[3])).lower().replace("weather in", "")


ENDINGS: list[tuple[dict[str, Any], str, Any, tuple[str, str | None]]] = [
    ({}, "t</think>\n\nHi", [("thinking", "t"), ("text", "Hi")], ("end_turn", None)),
    ({"max_tokens": 1}, "t t t", [("thinking", "t")], ("max_tokens", None)),
    (
        {"stop_sequences": ["END"]},
        "t</think>\n\nHi END",
        [("thinking", "t"), ("text", "Hi ")],
        ("stop_sequence", "END"),
    ),
    ({"thinking": {"type": "disabled"}}, "</think>\n\nHi", [("text", "Hi")], ("end_turn", None)),
    (
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        "t</think>\n\nHi",
        [("text", "Hi")],
        ("end_turn", None),
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ANSWER,
        WHOLE[:3],
        ("tool_use", None),
    ),
    (
        {"tools": [TOOL], "max_tokens": len(THOUGHT) + 50},
        f'</think>\n\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="days">2</parameter>\n'
        f'<parameter name="city">{"K" * 200}',
        [("tool_use", {"days": 2})],
        ("max_tokens", None),
    ),
    ({}, "t", [("thinking", "t")], ("end_turn", None)),

]  # fmt: skip


async def test_how_an_answer_ends_and_what_of_it_is_shown(card: ModelCard) -> None:
    """Whole and streamed alike. Of a call that is cut off the arguments that are complete."""
    async with asking(card) as (engine, client):
        for fields, says, content, stop in ENDINGS:
            engine.says = tokens_of(card, says)
            answer = await client.messages.create(**asked(**fields))
            async with client.messages.stream(**asked(**fields)) as stream:
                final = await stream.get_final_message()
            for one in (answer, final):
                assert (shown(one.content), (one.stop_reason, one.stop_sequence)) == (content, stop)


async def test_a_thought_has_its_budget_and_an_answer_its_schema(card: ModelCard) -> None:
    """What is submitted is what chat submits for the same wish."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
    wishes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {"thinking_token_budget": 9}),
        ({"thinking": {"type": "disabled"}}, {"thinking_token_budget": 0}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        ),
        ({"metadata": {"user_id": "ann"}, "priority": 3}, {"user": "ann", "priority": 3}),
    ]
    async with serving(card) as (_, engine, url), httpx.AsyncClient(base_url=url) as client:
        for ours, theirs in wishes:
            for path, body in (("messages", asked(**ours)), ("chat/completions", asked(**theirs))):
                answer = await client.post(f"/v1/{path}", json={**body, "max_tokens": 40})
                assert answer.status_code == 200, answer.text
    found = [(s.grammar, s.tenant, s.priority, s.prompt) for s in engine.submissions]
    assert found[::2] == found[1::2]
    assert found[0] != found[2] != found[4]


async def test_a_forced_call_is_a_tool_to_use(card: ModelCard) -> None:
    """Chat says `stop` where the tool was named, as OpenAI has it; here there is one word for it."""
    async with asking(card, "t\n</think>\n\n<minimax:tool_call>\n" + CALL + "</minimax:tool_call>") as (
        engine,
        client,
    ):
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            answer = await client.messages.create(**asked(tools=[TOOL], tool_choice=choice))
            assert answer.stop_reason == "tool_use"
    assert all(submission.grammar is not None for submission in engine.submissions)


async def test_tokens_are_counted_as_they_are_billed(card: ModelCard) -> None:
    fields = {"model": "tiny", "messages": [USER], "system": "Be brief.", "tools": [TOOL]}
    async with asking(card, "t") as (engine, client):
        counted = await client.messages.count_tokens(**fields)  # type: ignore[arg-type]
        answer = await client.messages.create(**fields, max_tokens=5)  # type: ignore[call-overload]
        without = await client.messages.count_tokens(**fields, tool_choice={"type": "none"})  # type: ignore[arg-type]
        assert len(engine.submissions) == 1
    assert counted.input_tokens == answer.usage.input_tokens > without.input_tokens


async def test_refusals_of_every_kind_are_anthropics_exceptions(card: ModelCard) -> None:
    """Whoever refuses: the door, the framework, the reader, the scheduler."""
    async with asking(card, "t", api_key="sesam", body_bytes_max=2000) as (engine, client):
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            await client.messages.create(**asked())
        client.api_key = "sesam"  # sent as Authorization: Bearer, by clients before 2.0 as x-api-key
        with pytest.raises(anthropic.NotFoundError, match="accepted: tiny"):
            await client.messages.create(**asked(model="claude"))
        with pytest.raises(anthropic.RequestTooLargeError):
            await client.messages.create(**asked(system="x" * 3000))
        with pytest.raises(
            anthropic.BadRequestError, match=r"anthropic-version is .*; accepted: 2023-06-01 or later"
        ):
            await client.messages.create(**asked(), extra_headers={"anthropic-version": "2023-01-01"})
        engine.refusal = Overloaded("the queue is full", retry_after_s=2)
        with pytest.raises(anthropic.RateLimitError) as busy:
            await client.messages.create(**asked())
        engine.refusal = NotReady("no worker")
        with pytest.raises(anthropic.InternalServerError) as early:
            await client.messages.create(**asked())
    told: Any = unknown.value.body
    assert (set(told), told["type"], set(told["error"])) == ({"type", "error"}, "error", {"type", "message"})
    assert told["error"]["type"] == "authentication_error"
    assert unknown.value.request_id
    assert busy.value.response.headers["retry-after"] == "2"
    assert [one.value.body["error"]["type"] for one in (busy, early)] == ["rate_limit_error", "overloaded_error"]  # type: ignore[index]


async def test_an_error_after_the_headers_is_an_event(card: ModelCard) -> None:
    async with asking(card, "one two three four") as (engine, client):
        engine.failure_at = 4
        async with client.messages.stream(**asked()) as stream:
            with pytest.raises(anthropic.APIStatusError, match="no expert at <path>"):
                await stream.get_final_message()


async def test_unknown_fields_are_refused_where_a_deployment_wants_it(card: ModelCard) -> None:
    async with (
        serving(card, unknown_fields="refuse") as (_, engine, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        engine.says = tokens_of(card, "t")
        body = asked(foo=1, metadata={"bar": 2})
        answers = [await client.post("/v1/messages", json=one) for one in (body, asked())]
        chat = await client.post("/v1/chat/completions", json={"messages": [USER], "foo": 1})
    assert [answer.status_code for answer in answers] == [400, 200]
    assert "foo, metadata.bar: not read here" in answers[0].json()["error"]["message"]
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "foo")


async def test_another_models_secret_thoughts_are_left_out_by_name(card: ModelCard) -> None:
    turn = {
        "role": "assistant",
        "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Hi"}],
    }
    async with serving(card) as (_, engine, url), httpx.AsyncClient(base_url=url) as client:
        engine.says = tokens_of(card, "t")
        answer = await client.post(
            "/v1/messages", json=asked(messages=[USER, turn, USER], output_config={"effort": "low"})
        )
    assert (
        answer.headers["x-expertmesh-ignored-fields"] == "output_config.effort, messages.content.redacted_thinking"
    )


def test_arguments_that_break_off_are_those_that_are_complete() -> None:
    whole = '{"a": "x, \\"y", "b": {"c": [1, 2]}, "d": null}'
    found = [complete_ones(whole[:end]) for end in range(len(whole) + 1)]
    expected = json.loads(whole)
    assert found[-1] == found[-2] == expected
    for one in found:
        assert list(one.items()) == list(expected.items())[: len(one)]
    assert complete_ones("{}") == {}

"""Chat with thoughts and tools over a real socket, as openai's client reads it: whole, streamed, and sent back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

import model.synthetic_tokenizer
from gateway.model_card import ModelCard
from tests.unit.gateway_world import card_of, serving, write_checkpoint

USER: dict[str, Any] = {"role": "user", "content": "Weather in Köln?"}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    '<invoke name="weather">\n<parameter name="city">Köln "Süd"</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n'
)
ANSWER = (
    "The user wants\nweather.\n</think>\n\nLet me look.\n<minimax:tool_call>\n"
    f'{CALL}<invoke name="weather">\n</invoke>\n</minimax:tool_call>'
)
ARGUMENTS = [{"city": 'Köln "Süd"', "days": 2}, {}]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """With the family's template: a prompt ends inside a thought."""
    template = Path(model.synthetic_tokenizer.CHAT_TEMPLATE).read_text()
    return card_of(
        write_checkpoint(tmp_path_factory.mktemp("checkpoint"), template, temperature=0.0), context=2048
    )


def tokens_of(card: ModelCard, text: str) -> tuple[int, ...]:
    assert card.tokens is not None
    return tuple(card.tokens.encode(text))


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_a_whole_answer_has_thought_content_and_calls(card: ModelCard) -> None:
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, ANSWER)
        body = {"messages": [USER], "tools": [TOOL], "logprobs": True}
        response = (await client.post(f"{url}/v1/chat/completions", json=body)).json()
    answer = ChatCompletion.model_validate(response, strict=True)
    (choice,) = answer.choices
    assert choice.message.content == "Let me look."
    assert response["choices"][0]["message"]["reasoning"] == "The user wants\nweather."
    assert response["choices"][0]["message"]["reasoning_content"] == "The user wants\nweather."
    assert choice.finish_reason == "tool_calls"
    made: Any = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in made] == [("function", "weather")] * 2
    assert [json.loads(call.function.arguments) for call in made] == ARGUMENTS
    assert len({call.id for call in made}) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    thought = tokens_of(card, "The user wants\nweather.\n")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(thought)
    assert answer.usage.completion_tokens == len(engine.says) + 1
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or []) == len(engine.says) + 1


async def test_a_stream_is_gathered_by_openais_client(card: ModelCard) -> None:
    """Its own accumulator makes the same message of the chunks; a worker lost within a call is not seen."""
    async with serving(card) as (_, engine, url), client_of(url) as client:
        engine.says = tokens_of(card, ANSWER)
        engine.deaths = {3, len(engine.says) // 2}
        async with client.chat.completions.stream(
            model="tiny",
            messages=[USER],
            tools=[TOOL],
            stream_options={"include_usage": True},  # type: ignore[list-item]
        ) as stream:
            chunks = [event.chunk async for event in stream if event.type == "chunk"]
            final = await stream.get_final_completion()
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    made: Any = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in made] == ARGUMENTS
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks if chunk.choices]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "The user wants\nweather."
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in pieces if "id" in call] == [0, 1]
    assert len([call for call in pieces if call["index"] == 0]) > 10  # as they are generated, not at the end
    assert final.usage is not None
    assert final.usage.completion_tokens_details is not None
    assert final.usage.completion_tokens_details.reasoning_tokens


async def test_a_conversation_goes_on_where_it_was(card: ModelCard) -> None:
    """The answer, sent back with the tool's result, is in the next prompt exactly as it was generated."""
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, ANSWER)
        body = {"messages": [USER], "tools": [TOOL]}
        message = (await client.post(f"{url}/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in message["tool_calls"]
        ]
        body = {"messages": [USER, message, *results], "tools": [TOOL]}
        again = await client.post(f"{url}/v1/chat/completions", json=body)
    assert again.status_code == 200
    first, second = (submission.prompt for submission in engine.submissions)
    assert second[: len(first) + len(engine.says) + 1] == (*first, *engine.says, engine.eos)


@pytest.mark.parametrize(
    ("change", "says", "expected"),
    [
        ({}, "no thought ends", (None, "no thought ends", 0, "stop")),
        ({}, "t</think>\n\nHi", ("Hi", "t", 0, "stop")),
        ({"include_reasoning": False}, "t</think>\n\nHi", ("Hi", None, 0, "stop")),
        ({"parallel_tool_calls": False}, ANSWER, ("Let me look.", "The user wants\nweather.", 1, "tool_calls")),
        ({"max_tokens": 40}, "<minimax:tool_call>\n" + CALL, (None, None, 1, "length")),
        ({"tool_choice": "none"}, "</think><minimax:tool_call>", ("<minimax:tool_call>", None, 0, "stop")),
        ({"stop": "</think>"}, "t</think>Hi", (None, "t", 0, "stop")),
        ({"stop": "min_tok"}, "t</think>a min_tok", ("a ", "t", 0, "stop")),
    ],
)
async def test_what_a_client_may_choose(
    card: ModelCard, change: dict[str, Any], says: str, expected: tuple[str | None, str | None, int, str]
) -> None:
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, says)
        body = {"messages": [USER], "tools": [TOOL], **change}
        (choice,) = (await client.post(f"{url}/v1/chat/completions", json=body)).json()["choices"]
    message = choice["message"]
    found = message["content"] or None, message.get("reasoning"), len(message.get("tool_calls", []))
    assert (*found, choice["finish_reason"]) == expected


async def test_streamed_logprobs_are_the_whole_ones(card: ModelCard) -> None:
    """One entry per token, tags and eos included, whatever becomes text of which kind and when."""
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.says = tokens_of(card, ANSWER + " 🙂")
        body = {"messages": [USER], "tools": [TOOL], "logprobs": True, "top_logprobs": 2, "stop": ["no such end"]}
        whole = (await client.post(f"{url}/v1/chat/completions", json=body)).json()
        lines = (await client.post(f"{url}/v1/chat/completions", json={**body, "stream": True})).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    content = [entry for c in chunks for entry in (c["choices"][0]["logprobs"] or {}).get("content", [])]
    assert content == whole["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == ANSWER + " 🙂[e~["
    assert {len(entry["top_logprobs"]) for entry in content} == {2}

"""Unmodified clients against a real cluster: each API's own package, and what people build on them.

The model is random, so a tool is called because it must be. Seeds make a stream say what the whole answer said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel

from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

USER: Any = {"role": "user", "content": "Weather in Cologne?"}
SEED = {"seed": 5}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Weather(BaseModel):
    """Anthropic's client sends no bounds of lengths and numbers: this has an end without."""

    city: Literal["Bonn", "Köln"]
    is_dry: bool


@pytest.fixture(scope="module")
def open_ai(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Served) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


# --- openai: chat ------------------------------------------------------------------------------


def test_openai_chat_streams_what_it_answers_whole(open_ai: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": [USER], "max_tokens": 40, "seed": 5,
        "extra_body": {"thinking_token_budget": 9},
    }  # fmt: skip
    (whole,) = open_ai.chat.completions.create(**asked).choices
    chunks = list(open_ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content != ""
    thought = "".join(getattr(choice.delta, "reasoning", "") for choice in choices)
    assert thought == whole.message.reasoning  # type: ignore[attr-defined]
    assert choices[-1].finish_reason == whole.finish_reason
    assert chunks[-1].usage is not None


def test_openai_chat_is_parsed(open_ai: OpenAI) -> None:
    answer = open_ai.chat.completions.parse(
        model="tiny", messages=[USER], response_format=Weather, max_tokens=200, seed=5,
        extra_body={"thinking_token_budget": 9},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Weather)


# --- openai: responses ---------------------------------------------------------------------------


def test_openai_responses_stream_what_they_answer_whole(open_ai: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "input": "Weather in Cologne?", "instructions": "Be brief.", "max_output_tokens": 40,
        "extra_body": SEED | {"thinking_token_budget": 9},
    }  # fmt: skip
    whole = open_ai.responses.create(**asked)
    events = list(open_ai.responses.create(**asked, stream=True))
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text != ""
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert last.response.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]


def test_openai_responses_call_tools_and_go_on(open_ai: OpenAI) -> None:
    """The output goes back as it came, thought included, and what was cached of it is said."""
    tool: Any = {"type": "function", "name": "look_up", "parameters": SCHEMA, "strict": True}
    asked: dict[str, Any] = {"model": "tiny", "tools": [tool], "max_output_tokens": 200, "extra_body": SEED}
    with open_ai.responses.stream(
        **asked, input=[USER], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        first = stream.get_final_response()
    call: Any = first.output[-1]
    assert (first.status, call.type, call.name) == ("completed", "function_call", "look_up")
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    sent_back = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in first.output]
    second = open_ai.responses.create(**asked | {"max_output_tokens": 8}, input=[USER, *sent_back, result])
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 32


def test_openai_responses_are_parsed(open_ai: OpenAI) -> None:
    answer = open_ai.responses.parse(
        model="tiny", input="Weather?", text_format=Weather, max_output_tokens=200,
        extra_body=SEED | {"thinking_token_budget": 9},
    )  # fmt: skip
    assert isinstance(answer.output_parsed, Weather)


def test_openai_responses_refuse_what_needs_a_store(open_ai: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"previous_response_id is .* not supported here"):
        open_ai.responses.create(model="tiny", input="x", previous_response_id="resp_1")


# --- anthropic -----------------------------------------------------------------------------------


def test_anthropic_streams_what_it_answers_whole(claude: Anthropic) -> None:
    """Thought within its budget, text after it, counted before as it is billed."""
    fields: dict[str, Any] = {
        "model": "tiny", "system": "Be brief.", "messages": [USER],
        "thinking": {"type": "enabled", "budget_tokens": 9},
    }  # fmt: skip
    counted = claude.messages.count_tokens(**fields)
    whole = claude.messages.create(**fields, max_tokens=40, extra_body=SEED)
    with claude.messages.stream(**fields, max_tokens=40, extra_body=SEED) as stream:
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    for one in (whole, final):
        assert one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) == counted.input_tokens
    assert whole.usage.output_tokens_details is not None
    assert whole.usage.output_tokens_details.thinking_tokens <= 9


def test_anthropic_uses_tools_and_goes_on(claude: Anthropic) -> None:
    """A thought, a tool used, its result; and the next turn has the same conversation before it."""
    tool: Any = {"name": "look_up", "description": "Looks up.", "input_schema": SCHEMA}
    asked: dict[str, Any] = {"model": "tiny", "tools": [tool], "extra_body": SEED}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with claude.messages.stream(**asked, messages=[USER], tool_choice=choice, max_tokens=200) as stream:
        first = stream.get_final_message()
    used: Any = first.content[-1]
    assert (first.stop_reason, used.type, used.name) == ("tool_use", "tool_use", "look_up")
    jsonschema.validate(used.input, SCHEMA)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "sun"}
    history: Any = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**asked, messages=history, max_tokens=8)
    assert second.usage.cache_read_input_tokens
    counted = claude.messages.count_tokens(model="tiny", tools=[tool], messages=history)
    assert counted.input_tokens == second.usage.input_tokens + second.usage.cache_read_input_tokens


def test_anthropic_output_is_parsed(claude: Anthropic) -> None:
    answer = claude.messages.parse(
        model="tiny", messages=[USER], output_format=Weather, max_tokens=200, extra_body=SEED,
        thinking={"type": "enabled", "budget_tokens": 9},
    )  # fmt: skip
    assert isinstance(answer.parsed_output, Weather)


def test_anthropic_refusals_are_its_exceptions(claude: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="accepted: tiny"):
        claude.messages.create(model="claude", messages=[USER], max_tokens=2)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is 1000000; accepted: at most"):
        claude.messages.create(model="tiny", messages=[USER], max_tokens=1_000_000, stream=True)

"""Bodies of OpenAI's Responses API, as the bodies of chat that ask for the same.

So one validator with one set of defaults and limits judges both; what it refuses is said in this API's names.

Decisions a client can see:
- nothing is stored (decision 16): `store` is false unless given, and what needs a store is refused by name;
- `reasoning.effort` none ends a thought at once, others change nothing and are named as ignored;
  `thinking_token_budget` bounds it;
- who asks is `user`, or `safety_identifier` in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gateway.bodies import SamplingBody, accepted_for, passed_on, read, unsupported
from gateway.errors import BadRequest, invalid, renamed
from gateway.responses.items import Items
from gateway.validate import Call, Validator

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_METADATA = "an object of at most 16 strings of at most 512 characters, by names of at most 64"
_NAMES = (
    (".function.parameters", ".parameters"),
    (".function", ""),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
)


class ResponsesBody(SamplingBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "store": (None, False),
        "previous_response_id": (None,),
        "conversation": (None,),
        "background": (None, False),
        "prompt": (None,),
        "context_management": (None, []),
        "max_tool_calls": (None,),
        "truncation": (None, "disabled"),
        "top_logprobs": (None, 0),
        "modalities": (None, ["text"]),
    }

    input: Any = Field(None, description="a string, or a list of items")
    instructions: str | None = Field(None, description="a string")
    tools: Any = Field(None, description="a list of tools, each an object with type, name and parameters")
    tool_choice: Any = Field(
        None, description='"none"; with tools "auto", "required", or {"type": "function", "name": …}'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    max_output_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    text: dict[str, Any] | None = Field(
        None,
        description='an object with format: {"type": "text"}, {"type": "json_object"}, or '
        '{"type": "json_schema", "name": …, "schema": …}',
    )
    reasoning: dict[str, Any] | None = Field(None, description="an object with effort")
    thinking_token_budget: int | None = Field(
        None, ge=0, lt=2**31, description="an integer of at least 0: the longest thought, in tokens"
    )
    include: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description=f'a list of strings, of which "{_ENCRYPTED}" is known'
    )
    metadata: dict[str, Any] | None = Field(None, description=_METADATA)
    user: str | None = Field(None, max_length=64, description="a string of at most 64 characters")
    safety_identifier: str | None = Field(None, max_length=64, description="a string of at most 64 characters")


def call_of(validator: Validator, raw: dict[str, Any]) -> Call:
    """Raises BadRequest or NotFound, naming this API's fields."""
    body, ignored = read(raw, ResponsesBody)
    items = Items(body.instructions, body.input)
    _check_metadata(body.metadata)
    chat = passed_on(raw) | {
        "messages": items.messages,
        "tools": _tools(body.tools),
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_completion_tokens": body.max_output_tokens,
        "response_format": _format(body.text),
        "thinking_token_budget": _budget(body),
        "user": body.user or body.safety_identifier,
    }
    try:
        call = validator.chat(chat, prefix="resp_")
    except BadRequest as error:
        raise renamed(error, _NAMES) from None
    ignored = (*ignored, *_unread(body), *items.ignored, *call.ignored)
    return dataclasses.replace(call, ignored=ignored, repeated=_repeated(body, call))


def _tools(tools: Any) -> Any:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise invalid("tools", tools, accepted_for(ResponsesBody, "tools"))
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def _tool(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise invalid(f"{at}.type", kind, '"function": a tool that the client runs')
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _tool_choice(body: ResponsesBody) -> Any:
    given = body.tool_choice
    if given == "auto" and not body.tools:
        return None
    if isinstance(given, dict):
        if given.get("type") != "function":
            raise invalid("tool_choice.type", given.get("type"), '"function"')
        return {"type": "function", "function": {"name": given.get("name")}}
    if given is not None and not isinstance(given, str):
        raise invalid("tool_choice", given, accepted_for(ResponsesBody, "tool_choice"))
    return given


def _format(text: dict[str, Any] | None) -> Any:
    wanted = (text or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise invalid("text.format", wanted, accepted_for(ResponsesBody, "text"))
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}
    return wanted


def _budget(body: ResponsesBody) -> int | None:
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise invalid("reasoning.effort", effort, "a string")
    if effort == "none" and body.thinking_token_budget:
        raise invalid("thinking_token_budget", body.thinking_token_budget, "0, where reasoning.effort is none")
    return 0 if effort == "none" else body.thinking_token_budget


def _check_metadata(metadata: dict[str, Any] | None) -> None:
    for name, value in (metadata or {}).items():
        if not isinstance(value, str) or len(value) > 512 or len(name) > 64:
            raise invalid(f"metadata.{name[:64]}", value, _METADATA)
    if len(metadata or {}) > 16:
        raise invalid("metadata", metadata, _METADATA)


def _unread(body: ResponsesBody) -> tuple[str, ...]:
    """Names inside known fields that nobody looks at. Raises BadRequest for those whose lack would be missed."""
    reasoning = body.reasoning or {}
    unread = [f"reasoning.{name}" for name in reasoning if name != "effort" or reasoning[name] != "none"]
    unread += [f"text.{name}" for name in body.text or {} if name != "format"]
    for name in body.include or []:
        if name == _LOGPROBS:
            raise unsupported("include", name, ([_ENCRYPTED],))
        if name != _ENCRYPTED:
            unread.append(f"include.{name}")
    return tuple(unread)


def _repeated(body: ResponsesBody, call: Call) -> dict[str, Any]:
    """What a response says again of its request, with what held where nothing was given."""
    sampling, reasoning, text = call.requests[0].sampling, body.reasoning or {}, body.text or {}
    none_given = {"name": None, "description": None, "parameters": None, "strict": None}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": call.parallel_tool_calls,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "temperature": sampling.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{**none_given, **tool} for tool in body.tools or []],
        "top_p": sampling.top_p,
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "background": False,
        "max_tool_calls": None,
        "previous_response_id": None,
        "store": False,
        "top_logprobs": 0,
        "truncation": "disabled",
    }

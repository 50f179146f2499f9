"""Bodies of Anthropic's Messages API, as the bodies of chat that ask for the same.

So one validator with one set of defaults and limits judges both; what it refuses is said in Anthropic's names.

Decisions a client can see:
- the family always thinks. `thinking` left out or `adaptive` leaves it free, `enabled` bounds it by
  `budget_tokens`, `disabled` ends it at once; `display: omitted` keeps it from the answer;
- `max_tokens` may be left out: then it is what the context leaves;
- `metadata.user_id` is the tenant; one of more than 64 characters counts by its hash;
- a `tool_choice` of a tool means one call of it;
- `temperature`, `top_p` and `top_k` are read under every version, though the one of 2026-10-21 has them no more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gateway.bodies import Body, SamplingBody, accepted_for, passed_on, read
from gateway.errors import BadRequest, invalid, renamed
from gateway.messages.history import History, tools_of
from gateway.validate import Call, Validator

_FIRST_VERSION = "2023-06-01"  # of events as they are today
_USER_CHARS = 64
_NAMES = (
    (".function.parameters", ".input_schema"),
    (".parameters.properties", ".input_schema.properties"),
    (".function", ""),
    ("stop", "stop_sequences"),
    ("thinking_token_budget", "thinking.budget_tokens"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("user", "metadata.user_id"),
)


class CountTokensBody(Body):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mcp_servers": (None, []),
        "container": (None,),
        "output_format": (None,),
    }

    messages: Any = Field(None, description="a list of messages, each an object with role and content")
    system: Any = Field(None, description="a string, or a list of blocks of type text")
    tools: Any = Field(None, description="a list of tools, each an object with name and input_schema")
    tool_choice: Any = Field(
        None, description='with tools, an object of type "auto", "any", "none", or "tool" with a name'
    )
    thinking: Any = Field(
        None, description='an object of type "adaptive", "disabled", or "enabled" with budget_tokens'
    )
    output_config: Any = Field(
        None, description='an object with format: null or {"type": "json_schema", "schema": …}'
    )


class MessagesBody(CountTokensBody, SamplingBody):
    max_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="a list of strings, none of them empty"
    )
    metadata: dict[str, Any] | None = Field(None, description="an object with user_id, a string")


def check_version(version: str | None) -> None:
    """Of the API, as the header says. Raises BadRequest."""
    is_date = version is None or re.fullmatch(r"\d{4}-\d\d-\d\d", version, re.ASCII)
    if not is_date or (version is not None and version < _FIRST_VERSION):
        raise invalid("anthropic-version", version, f"{_FIRST_VERSION} or later, or none")


def call_of(validator: Validator, raw: dict[str, Any]) -> Call:
    """Raises BadRequest or NotFound, naming Anthropic's fields."""
    body, ignored = read(raw, MessagesBody)
    history = History(body.system, body.messages)
    choice, is_single = _tool_choice(body)
    budget, is_shown = _thinking(body, body.max_tokens)
    chat = passed_on(raw) | {
        "messages": history.messages,
        "tools": tools_of(body.tools),
        "tool_choice": choice,
        "parallel_tool_calls": not is_single,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "thinking_token_budget": budget,
        "include_reasoning": is_shown,
        "response_format": _format(body),
        "user": _user(body),
    }
    try:
        call = validator.chat(chat, prefix="msg_")
    except BadRequest as error:
        raise renamed(error, _NAMES) from None
    return dataclasses.replace(call, ignored=(*ignored, *_unread(body), *history.ignored, *call.ignored))


def count_of(validator: Validator, raw: dict[str, Any]) -> dict[str, Any]:
    """The answer of count_tokens: what a message of the same fields is counted as. Raises as `call_of`."""
    body, _ = read(raw, CountTokensBody)
    history = History(body.system, body.messages)
    choice, _ = _tool_choice(body)
    _thinking(body, None)
    _format(body)
    chat = {"model": body.model, "messages": history.messages, "tools": tools_of(body.tools)}
    if choice == "none":
        del chat["tools"]
    try:
        return {"input_tokens": validator.tokenised(chat)["count"]}
    except BadRequest as error:
        raise renamed(error, _NAMES) from None


def _tool_choice(body: CountTokensBody) -> tuple[Any, bool]:
    """As chat has it, and whether at most one tool may be called."""
    given = body.tool_choice
    if given is None:
        return None, False
    if not isinstance(given, dict):
        raise _wrong(body, "tool_choice")
    is_single = given.get("disable_parallel_tool_use") or False
    if not isinstance(is_single, bool):
        raise invalid("tool_choice.disable_parallel_tool_use", is_single, "true or false")
    match given.get("type"):
        case "auto":
            return "auto" if body.tools else None, is_single
        case "none":
            return "none", is_single
        case "any":
            return "required", is_single
        case "tool":
            return {"type": "function", "function": {"name": given.get("name")}}, True
    raise invalid("tool_choice.type", given.get("type"), "auto, any, tool or none")


def _thinking(body: CountTokensBody, max_tokens: int | None) -> tuple[int | None, bool]:
    """The longest thought in tokens, None where nothing bounds it, and whether it is shown."""
    given = body.thinking
    if given is None:
        return None, True
    if not isinstance(given, dict):
        raise _wrong(body, "thinking")
    display = given.get("display")
    if display not in (None, "summarized", "omitted"):
        raise invalid("thinking.display", display, "summarized or omitted")
    match given.get("type"):
        case "disabled":
            return 0, False
        case "adaptive":
            return None, display != "omitted"
        case "enabled":
            budget = given.get("budget_tokens")
            most = 2**31 if max_tokens is None else max_tokens
            if type(budget) is not int or not 0 <= budget < most:
                bound = "" if max_tokens is None else f" and below max_tokens, {max_tokens}"
                raise invalid("thinking.budget_tokens", budget, f"an integer of at least 0{bound}")
            return budget, display != "omitted"
    raise invalid("thinking.type", given.get("type"), "enabled, disabled or adaptive")


def _format(body: CountTokensBody) -> dict[str, Any] | None:
    given = body.output_config
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _wrong(body, "output_config")
    wanted = given.get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema" or "schema" not in wanted:
        raise invalid("output_config.format", wanted, 'null or {"type": "json_schema", "schema": …}')
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": wanted["schema"]}}


def _user(body: MessagesBody) -> str | None:
    given = (body.metadata or {}).get("user_id")
    if given is None:
        return None
    if not isinstance(given, str):
        raise invalid("metadata.user_id", given, "a string")
    return given if len(given) <= _USER_CHARS else hashlib.blake2b(given.encode(), digest_size=32).hexdigest()


def _unread(body: MessagesBody) -> tuple[str, ...]:
    """Names inside known fields that nobody looks at."""
    metadata = (f"metadata.{name}" for name in body.metadata or {} if name != "user_id")
    config = (f"output_config.{name}" for name in body.output_config or {} if name != "format")
    return (*metadata, *config)


def _wrong(body: Body, field: str) -> BadRequest:
    return invalid(field, getattr(body, field), accepted_for(type(body), field))

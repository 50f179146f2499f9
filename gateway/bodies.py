"""Request bodies as clients write them: which fields exist, their types and fixed bounds.

A field's description is the end of the sentence "accepted: …" in the error for it, and the schema in
/openapi.json. Bounds that a deployment sets are checked in `validate`. Unknown fields are let through and
named in a response header; known ones whose meaning is not served are refused by name, unless neutral.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import BadRequest, NotJson, invalid, shown

_INT64 = 2**63
_INT32 = 2**31


class Body(BaseModel):
    """`neutral`: known fields that would change the answer and are not served, with the values that do not."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = Field(None, description="the name of the served model, see /v1/models")


class SamplingBody(Body):
    """What every generating endpoint takes: how tokens are drawn, and how the call is served."""

    temperature: float | None = Field(None, ge=0, le=1e6, description="a number from 0 to 1000000; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    top_k: int | None = Field(None, ge=-1, description="an integer of at least 0; 0 or -1 for all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1; 0 for all tokens")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2; 0 is none")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2; 0 is none")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="a number from 0.01 to 100; 1 is none"
    )
    logit_bias: Any = Field(
        None, description="an object of token ids, as strings, each with a number from -100 to 100"
    )
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="a list of strings, none of them blank"
    )
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        None, description="a list of at least one token id"
    )
    min_tokens: int | None = Field(None, ge=0, description="an integer from 0 to max_tokens")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="an integer from -2^63 to 2^63 - 1")
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        None, description="a list of token ids"
    )
    ignore_eos: bool | None = Field(None, description="true or false")
    stream: bool | None = Field(None, description="true or false")
    priority: int | None = Field(
        None, ge=-_INT32, lt=_INT32, description="an integer from -2^31 to 2^31 - 1; lower runs earlier"
    )
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="a string of 1 to 256 characters"
    )
    timeout: float | None = Field(None, gt=0, description="a number of seconds above 0")


class GenerateBody(SamplingBody):
    """What completions and chat share, and the extensions that other engines have too."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": (None,),
        "tool_choice": (None, "none"),
        "functions": (None,),
        "function_call": (None, "none"),
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
        "truncate_prompt_tokens": (None,),
        "skip_special_tokens": (None, True),
        "include_stop_str_in_output": (None, False),
        "continue_final_message": (None, False),
        "add_generation_prompt": (None, True),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "modalities": (None, ["text"]),
        "audio": (None,),
    }

    max_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    n: int | None = Field(None, ge=1, description="an integer of at least 1")
    prompt_logprobs: int | None = Field(None, ge=0, description="an integer of at least 0, unless stream is true")
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="a string or a list of strings, none of them empty"
    )
    stream_options: dict[str, Any] | None = Field(
        None, description="an object with include_usage (true or false), together with stream: true"
    )
    user: str | None = Field(None, max_length=64, description="a string of at most 64 characters")
    response_format: Any = Field(
        None, description='{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": …}'
    )
    structured_outputs: Any = Field(
        None, description="an object with exactly one of json, json_object, regex, choice and grammar"
    )
    guided_json: Any = Field(None, description="a JSON Schema, as an object or as its JSON")
    guided_regex: Any = Field(None, description="a regular expression")
    guided_choice: Any = Field(None, description="a list of strings, one of which is the answer")
    guided_grammar: Any = Field(None, description="a grammar in Lark's syntax")
    thinking_token_budget: int | None = Field(
        None, ge=0, lt=_INT32, description="for chat, an integer of at least 0: the longest thought, in tokens"
    )
    return_token_ids: bool | None = Field(None, description="true or false")
    return_tokens_as_token_ids: bool | None = Field(None, description="true or false")


class CompletionBody(GenerateBody):
    prompt: Any = Field(
        None, description="a string, a list of strings, a list of token ids, or a list of such lists"
    )
    max_tokens: int | None = Field(None, ge=0, description="an integer of at least 1; or 0, with echo: true")
    logprobs: int | None = Field(None, ge=0, description="an integer of at least 0")
    echo: bool | None = Field(None, description="true or false")
    best_of: int | None = Field(None, ge=1, description="null, or what n is")


class ChatBody(GenerateBody):
    messages: Any = Field(None, description="a list of messages, each an object with role and content")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer of at least 1")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, description="an integer of at least 0, with logprobs: true")
    tools: Any = Field(None, description="a list of tools, each an object with type and function")
    tool_choice: Any = Field(
        None, description='"none"; with tools "auto", "required", or {"type": "function", "function": {"name": …}}'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    include_reasoning: bool | None = Field(None, description="true or false")


class TokenizeBody(Body):
    """As vLLM's, for a prompt or for messages."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: GenerateBody.neutral[name]
        for name in ("continue_final_message", "add_generation_prompt", "chat_template", "chat_template_kwargs")
    }

    prompt: str | None = Field(None, description="a string, unless messages are given")
    messages: Any = Field(None, description="a list of messages, unless a prompt is given")
    tools: Any = Field(None, description="a list of tools, with messages")
    add_special_tokens: bool | None = Field(None, description="true or false")
    return_token_strs: bool | None = Field(None, description="true or false")


class DetokenizeBody(Body):
    tokens: Annotated[list[int], Field(fail_fast=True)] | None = Field(None, description="a list of token ids")


# What a request names, in any dialect, whose answer is held to a grammar.
_HOLDING = (b"response_format", b"structured_outputs", b"guided_", b"tool_choice", b"json_schema", b"json_object")

Kind = TypeVar("Kind", bound=Body)


def parse(raw: bytes | bytearray, content_type: str) -> dict[str, Any]:
    """The JSON object of a request body. Raises NotJson (415) or BadRequest (400)."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise NotJson(f"content-type is {shown(media_type)}; accepted: application/json")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {shown(body)}; accepted: a JSON object", code="invalid_json")
    return body


def may_have_grammar(raw: bytes | bytearray) -> bool:
    """Whether the answer may have to be held to one, which takes time to compile. True for some without."""
    return any(name in raw for name in _HOLDING)


def read(body: dict[str, Any], kind: type[Kind]) -> tuple[Kind, tuple[str, ...]]:
    """The typed body and the names of the fields nobody will look at. Raises BadRequest naming a field."""
    for field, accepted in kind.neutral.items():
        if field in body and field not in kind.model_fields and body[field] not in accepted:
            raise unsupported(field, body[field], accepted)
    try:
        typed = kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, kind, body) from None
    unknown = (name for name in body if name not in kind.model_fields and name not in kind.neutral)
    return typed, tuple(unknown)


def passed_on(body: dict[str, Any]) -> dict[str, Any]:
    """What of a body every generating endpoint reads under the same name."""
    return {name: body[name] for name in SamplingBody.model_fields if name in body}


def unsupported(field: str, value: Any, accepted: Sequence[Any]) -> BadRequest:
    """The sentence for a value that has a meaning, but not here."""
    served = " or ".join(orjson.dumps(one).decode() for one in accepted)
    return BadRequest(
        f"{field} is {shown(value)}, which is not supported here; accepted: {served}",
        param=field,
        code="unsupported_parameter",
    )


def _refusal(error: ValidationError, kind: type[Body], body: dict[str, Any]) -> BadRequest:
    """The first thing that is wrong, by the field's own description."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    return invalid(field, body.get(field), accepted_for(kind, field))


def accepted_for(kind: type[Body], field: str) -> str:
    """What a field accepts, in words."""
    return str(kind.model_fields[field].description)

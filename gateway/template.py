"""The checkpoint's own chat template, rendered in a sandbox, and messages brought into the form it expects.

Templates of the family silently drop or misprint what they do not foresee (null contents, arguments as JSON
strings, a second system message), so what the API allows is normalised first:

- content: text parts are joined by newlines; null, for assistant and tool messages only, is empty;
- role developer is system; all system messages are joined by a blank line into one at the front;
- a tool call's arguments, a JSON string in the API, become an object;
- tool results that follow each other come in the order of their calls;
- reasoning is `reasoning_content`, also where it came as `reasoning` or `reasoning_details`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import BadRequest, CheckpointUnreadable, invalid

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("text", "reasoning.text")

Message = dict[str, Any]


class ChatTemplate:
    """Raises CheckpointUnreadable where the template is not jinja2."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointUnreadable("chat template", str(error)) from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The prompt that asks for the next assistant turn. `messages` are normalised.

        Raises BadRequest (messages) with the template's own words where it refuses them.
        """
        try:
            return self._template.render(
                messages=list(messages), tools=tools, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise BadRequest(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error


def load_template(folder: Path) -> ChatTemplate | None:
    """From chat_template.jinja, else tokenizer_config.json; None where neither has one."""
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    source = path.read_text() if path.exists() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    named = {key: spelled(config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return ChatTemplate(source, {key: token for key, token in named.items() if token})


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON object; empty where the file is absent. Raises CheckpointUnreadable."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointUnreadable(path.name, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointUnreadable(path.name, "must hold a JSON object")
    return value


def normalise(messages: Sequence[Any]) -> list[Message]:
    """Messages as the template expects them (see above). Raises BadRequest naming the message and field."""
    if not messages:
        raise invalid("messages", messages, "at least one message")
    system: list[str] = []
    others: list[Message] = []
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict):
            raise invalid(at, message, "an object with role and content")
        role = message.get("role")
        if role not in _ROLES:
            raise invalid(f"{at}.role", role, ", ".join(_ROLES))
        content = text_of(message.get("content"), f"{at}.content", may_be_null=role in ("assistant", "tool"))
        if role in ("system", "developer"):
            system.append(content)
        elif role == "assistant":
            others.append(_assistant(message, content, at))
        else:
            kept = {key: message[key] for key in ("name", "tool_call_id") if key in message}
            others.append({**kept, "role": role, "content": content})
    _order_results(others)
    return [{"role": "system", "content": "\n\n".join(system)}, *others] if system else others


def _order_results(messages: list[Message]) -> None:
    """Templates tell results of several calls apart by their order alone, clients by their ids."""
    places: dict[Any, int] = {}
    start = 0
    for number, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool":
            continue
        results = messages[start:number]
        if len(places) > 1 and all(result.get("tool_call_id") in places for result in results):
            messages[start:number] = sorted(results, key=lambda result: places[result["tool_call_id"]])
        calls = message.get("tool_calls") or []
        places = {call["id"]: place for place, call in enumerate(calls) if isinstance(call.get("id"), str)}
        start = number + 1


def _assistant(message: Message, content: str, at: str) -> Message:
    result: Message = {"role": "assistant", "content": content}
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("reasoning_details")
    if reasoning:
        result["reasoning_content"] = text_of(
            reasoning, f"{at}.reasoning_content", may_be_null=True, kinds=_REASONING_PARTS
        )
    calls = message.get("tool_calls")
    if calls is None:
        return result
    if not isinstance(calls, list):
        raise invalid(f"{at}.tool_calls", calls, "a list of tool calls")
    if calls:
        result["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return result


def _tool_call(call: Any, at: str) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(at, call, "an object with function: {name, arguments}")
    arguments = arguments_of(function.get("arguments") or "{}", f"{at}.function.arguments")
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def arguments_of(arguments: Any, at: str) -> dict[str, Any]:
    """A call's arguments as an object. Raises BadRequest."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid(at, arguments, "a JSON object, or a string that holds one")
    return parsed


def text_of(content: Any, at: str, *, may_be_null: bool, kinds: tuple[str, ...] = _TEXT_PARTS) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        raise invalid(at, content, "a string, or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise invalid(
                f"{at}[{number}]",
                part if kind is None else kind,
                "a part of type text with a string text; this model reads nothing else",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def spelled(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string, or as an object with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates expect it: jinja2's own escapes HTML and knows no ensure_ascii."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

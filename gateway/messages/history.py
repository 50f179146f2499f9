"""Conversations as Anthropic's API writes them, as messages that the chat template can be given.

Decisions a client can see:
- a turn's blocks become one message: its thoughts, its text and its calls, each joined as they were generated;
- results of tools come before the text beside them, in the order of their calls; one with `is_error` begins with
  "Error: ";
- thoughts that another model encrypted (`redacted_thinking`) cannot be read, and are left out by name;
- the conversation ends with the user: an answer is not continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gateway.errors import invalid, shown
from gateway.template import Message, arguments_of, text_of

_ROLES = ("user", "assistant", "system")
_OF_USER = "a block of type text or tool_result; this model reads nothing else"
_OF_ASSISTANT = "a block of type text, thinking or tool_use; this model reads nothing else"
_MESSAGES = "a list of at least one message, each an object with role and content"


class History:
    """`messages` in the form of chat; `ignored`: kinds of blocks that were left out."""

    def __init__(self, system: Any, messages: Any) -> None:
        """Raises BadRequest naming message, block and field."""
        self.messages: list[Message] = []
        self.ignored: tuple[str, ...] = ()
        self._calls: list[str] = []  # ids that the turn before has called and that have no result yet
        if system is not None:
            self.messages.append({"role": "system", "content": text_of(system, "system", may_be_null=False)})
        if not isinstance(messages, list) or not messages:
            raise invalid("messages", messages, _MESSAGES)
        for number, message in enumerate(messages):
            self._read(message, f"messages[{number}]")
        if messages[-1]["role"] == "assistant":
            raise invalid(f"messages[{len(messages) - 1}].role", "assistant", "user: an answer is not continued")

    def _read(self, message: Any, at: str) -> None:
        if not isinstance(message, dict):
            raise invalid(at, message, "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise invalid(f"{at}.role", role, ", ".join(_ROLES))
        if role == "system":
            self.messages.append({"role": role, "content": text_of(content, f"{at}.content", may_be_null=False)})
            return
        if role == "user":
            self._read_user(content, f"{at}.content")
        if self._calls:
            missing = shown(self._calls[0])
            raise invalid(f"{at}.content", content, f"a tool_result for each tool_use before it, {missing} too")
        if role == "assistant":
            self._read_assistant(content, f"{at}.content")

    def _read_user(self, content: Any, at: str) -> None:
        texts: list[str] = []
        for kind, block, where in _blocks(content, at):
            match kind:
                case "text":
                    texts.append(text_of([block], where, may_be_null=False, kinds=("text",)))
                case "tool_result":
                    self.messages.append(self._result(block, where))
                case _:
                    raise invalid(f"{where}.type", kind, _OF_USER)
        if texts or not content:
            self.messages.append({"role": "user", "content": "\n".join(texts)})

    def _result(self, block: dict[str, Any], at: str) -> Message:
        called = block.get("tool_use_id")
        if called not in self._calls:
            raise invalid(f"{at}.tool_use_id", called, "the id of a tool_use in the message before, once")
        self._calls.remove(called)
        text = text_of(block.get("content"), f"{at}.content", may_be_null=True, kinds=("text",))
        is_error = block.get("is_error")
        if is_error not in (None, True, False):
            raise invalid(f"{at}.is_error", is_error, "true or false")
        return {"role": "tool", "tool_call_id": called, "content": f"Error: {text}" if is_error else text}

    def _read_assistant(self, content: Any, at: str) -> None:
        thoughts: list[str] = []
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for kind, block, where in _blocks(content, at):
            match kind:
                case "text":
                    texts.append(text_of([block], where, may_be_null=False, kinds=("text",)))
                case "thinking":
                    thoughts.append(_string(block, "thinking", where))
                case "redacted_thinking":
                    self.ignored = ("messages.content.redacted_thinking",)
                case "tool_use":
                    calls.append(self._call(block, where))
                case _:
                    raise invalid(f"{where}.type", kind, _OF_ASSISTANT)
        message = {"role": "assistant", "content": "".join(texts), "reasoning_content": "".join(thoughts)}
        self.messages.append({**message, "tool_calls": calls} if calls else message)

    def _call(self, block: dict[str, Any], at: str) -> dict[str, Any]:
        called, name = _string(block, "id", at), _string(block, "name", at)
        if called in self._calls:
            raise invalid(f"{at}.id", called, "an id that no other tool_use of the message has")
        self._calls.append(called)
        given = block.get("input")
        if not isinstance(given, dict):
            raise invalid(f"{at}.input", given, "a JSON object")
        arguments = arguments_of(given, f"{at}.input")
        return {"id": called, "function": {"name": name, "arguments": arguments}}


def _blocks(content: Any, at: str) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(type, block, place) of each; a string is one block of text."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise invalid(at, content, "a string, or a list of blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise invalid(f"{at}[{number}]", block, "a block, which is an object with type")
        yield block.get("type"), block, f"{at}[{number}]"


def _string(block: dict[str, Any], name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{at}.{name}", value, "a string")
    return value


def tools_of(tools: Any) -> Any:
    """Tools in the form of chat. Those that another's server runs are refused. Raises BadRequest."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise invalid("tools", tools, "a list of tools, each an object with name and input_schema")
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def _tool(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise invalid(at, tool, "an object with name and input_schema")
    if tool.get("type") not in (None, "custom"):
        raise invalid(f"{at}.type", tool["type"], 'null or "custom": a tool that the client runs')
    if not isinstance(tool.get("input_schema"), dict):
        raise invalid(f"{at}.input_schema", tool.get("input_schema"), "a JSON Schema of type object")
    kept: Sequence[str] = [name for name in ("name", "description", "strict") if tool.get(name) is not None]
    return {
        "type": "function",
        "function": {**{name: tool[name] for name in kept}, "parameters": tool["input_schema"]},
    }

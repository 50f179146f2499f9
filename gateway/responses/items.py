"""Input of OpenAI's Responses API, a text or a list of items, as messages that the chat template can be given.

Decisions a client can see:
- reasoning, an assistant's text and calls that follow each other are one turn, as they were generated; reasoning
  after text or a call begins the next turn;
- reasoning is read from its `content`, else from `encrypted_content` that this API gave out; another's cannot be
  read, and is left out by name;
- the input ends with the user or a tool's output: an answer is not continued.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from gateway.errors import invalid, shown
from gateway.template import Message, arguments_of, text_of

_TEXTS = ("input_text", "output_text", "text")
_THOUGHTS = ("reasoning_text", "text")
_KINDS = "message, reasoning, function_call or function_call_output; nothing is stored, and no tool runs here"
_SEAL = "thought:"


def sealed(thought: str) -> str:
    """A thought as clients that keep nothing else send it back. Not a secret: they were shown it too."""
    return _SEAL + base64.b64encode(thought.encode()).decode()


def _unsealed(content: Any) -> str | None:
    if not isinstance(content, str) or not content.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(content.removeprefix(_SEAL), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


class Items:
    """`messages` in the form of chat; `ignored`: what was left out."""

    def __init__(self, instructions: str | None, given: Any) -> None:
        """Raises BadRequest naming item and field."""
        self.messages: list[Message] = []
        self.ignored: tuple[str, ...] = ()
        self._turn: Message | None = None  # the assistant's, not ended yet
        self._calls: dict[str, bool] = {}  # by id, whether it has its output
        if instructions is not None:
            self.messages.append({"role": "system", "content": instructions})
        if isinstance(given, str):
            self.messages.append({"role": "user", "content": given})
            return
        if not isinstance(given, list) or not given:
            raise invalid("input", given, "a string, or a list of at least one item")
        for number, item in enumerate(given):
            if not isinstance(item, dict):
                raise invalid(f"input[{number}]", item, "an item, which is an object with type, or with role")
            self._read(item, f"input[{number}]")
        for called, has_output in self._calls.items():
            if not has_output:
                raise invalid(
                    "input", given, f"a function_call_output for each function_call, {shown(called)} too"
                )
        if self._turn is not None:
            raise invalid("input", given, "a list that ends with the user or a tool: an answer is not continued")

    def _read(self, item: dict[str, Any], at: str) -> None:
        match item.get("type", "message"):
            case "message":
                self._message(item, at)
            case "reasoning":
                self._reasoning(item, at)
            case "function_call":
                self._call(item, at)
            case "function_call_output":
                self._output(item, at)
            case other:
                raise invalid(f"{at}.type", other, _KINDS)

    def _message(self, item: dict[str, Any], at: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role == "assistant":
            self._assistant()["content"] += self._said(content, f"{at}.content")
            return
        if role not in ("user", "system", "developer"):
            raise invalid(f"{at}.role", role, "user, assistant, system or developer")
        self._turn = None
        text = text_of(content, f"{at}.content", may_be_null=False, kinds=_TEXTS)
        self.messages.append({"role": role, "content": text})

    def _said(self, content: Any, at: str) -> str:
        """Parts of an answer follow each other without a break."""
        if not isinstance(content, list):
            return text_of(content, at, may_be_null=False)
        parts = enumerate(content)
        return "".join(text_of([part], f"{at}[{i}]", may_be_null=False, kinds=_TEXTS) for i, part in parts)

    def _reasoning(self, item: dict[str, Any], at: str) -> None:
        if self._turn is not None and (self._turn["content"] or "tool_calls" in self._turn):
            self._turn = None
        thought = text_of(item.get("content"), f"{at}.content", may_be_null=True, kinds=_THOUGHTS)
        if not thought and (content := item.get("encrypted_content")) is not None:
            unsealed = _unsealed(content)
            if unsealed is None:
                self.ignored = ("input.encrypted_content",)
            thought = unsealed or ""
        self._assistant()["reasoning_content"] += thought

    def _call(self, item: dict[str, Any], at: str) -> None:
        called, name = item.get("call_id"), item.get("name")
        if not isinstance(called, str) or called in self._calls:
            raise invalid(f"{at}.call_id", called, "a string that no other call has")
        if not isinstance(name, str):
            raise invalid(f"{at}.name", name, "a string")
        arguments = arguments_of(item.get("arguments") or "{}", f"{at}.arguments")
        self._calls[called] = False
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": called, "function": {"name": name, "arguments": arguments}})

    def _output(self, item: dict[str, Any], at: str) -> None:
        called = item.get("call_id")
        if not isinstance(called, str) or self._calls.get(called) is not False:
            raise invalid(f"{at}.call_id", called, "the call_id of a function_call before it, once")
        self._calls[called] = True
        self._turn = None
        text = text_of(item.get("output"), f"{at}.output", may_be_null=False, kinds=_TEXTS)
        self.messages.append({"role": "tool", "tool_call_id": called, "content": text})

    def _assistant(self) -> Message:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": "", "reasoning_content": ""}
            self.messages.append(self._turn)
        return self._turn

"""The items of a response as far as they have come: reasoning, messages and function calls, and what told them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from gateway.parsers.calls import CallDelta, Said, key_of
from gateway.responses.items import sealed

Event = dict[str, Any]


class Output:
    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""  # reasoning, a message, a call by its index; none
        self._said: list[str] = []  # in the open item

    def more(self, part: Said | CallDelta) -> Iterator[Event]:
        """Events without their numbers."""
        if self._open != (key := key_of(part)):
            yield from self.end("completed")
            yield from self._begin(part)
            self._open = key
        item, text = self.items[-1], part.arguments if isinstance(part, CallDelta) else part.text
        self._said.append(text)
        match item["type"]:
            case "function_call":
                if text:
                    yield self._event("function_call_arguments.delta", delta=text)
            case "reasoning":
                yield self._event("reasoning_text.delta", content_index=0, delta=text)
            case _:
                yield self._event("output_text.delta", content_index=0, delta=text, logprobs=[])

    def end(self, status: str) -> Iterator[Event]:
        """The open item ends, if there is one. `status`: completed, or incomplete where the answer was cut."""
        if not self._open:
            return
        item, said = self.items[-1], "".join(self._said)
        item["status"] = status
        match item["type"]:
            case "function_call":
                item["arguments"] = said
                yield self._event("function_call_arguments.done", name=item["name"], arguments=said)
            case "reasoning":
                item["content"] = [{"type": "reasoning_text", "text": said}]
                item["encrypted_content"] = sealed(said)
                yield self._event("reasoning_text.done", content_index=0, text=said)
            case _:
                item["content"] = [_text(said)]
                yield self._event("output_text.done", content_index=0, text=said, logprobs=[])
        if item["type"] != "function_call":
            yield self._event("content_part.done", content_index=0, part=item["content"][0])
        yield self._item_event("output_item.done", item)
        self._open = ""
        self._said.clear()

    def _begin(self, part: Said | CallDelta) -> Iterator[Event]:
        if isinstance(part, CallDelta):
            call = {"type": "function_call", "call_id": _id("call"), "name": part.name, "arguments": ""}
            yield self._added("fc", call)
            return
        if part.is_thought:
            yield self._added("rs", {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None})
            first = {"type": "reasoning_text", "text": ""}
        else:
            yield self._added("msg", {"type": "message", "role": "assistant", "content": []})
            first = _text("")
        yield self._event("content_part.added", content_index=0, part=first)

    def _added(self, prefix: str, item: dict[str, Any]) -> Event:
        self.items.append({"id": _id(prefix), **item, "status": "in_progress"})
        return self._item_event("output_item.added", dict(self.items[-1]))

    def _item_event(self, kind: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        """Of the open item."""
        index = len(self.items) - 1
        return {"type": f"response.{kind}", "item_id": self.items[-1]["id"], "output_index": index, **fields}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"

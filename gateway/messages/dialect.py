"""The dialect of Anthropic's /v1/messages: a message of blocks, streamed as named events.

A block of thought carries a signature, which clients of that API must send back: a hash of its text. Nothing
checks it; what is sent back is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from gateway.dialect import Dialect
from gateway.errors import Refusal
from gateway.messages.errors import error_body
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.parsers.calls import CallDelta, Said, key_of
from gateway.request import FinishReason
from gateway.stream import NAMED, Framing
from gateway.text import Piece
from gateway.turn import Turn
from gateway.validate import Call


class MessagesDialect(Dialect):
    framing: ClassVar[Framing] = NAMED

    def __init__(self, call: Call, card: ModelCard) -> None:
        self._call = call
        self._card = card
        self._turn = Turn(call, card)
        self._blocks = Blocks()
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self.marked = card.tags.ids if card.tags is not None else frozenset[int]()

    def opening(self) -> Iterable[dict[str, Any]]:
        """What of the prompt was cached is not known yet: the last event but one says it."""
        yield {"type": "message_start", "message": self._message(Usage(self._call.num_prompt_tokens))}
        yield {"type": "ping"}

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        for part in self._turn.take(piece).parts:
            if self._call.include_reasoning or not (isinstance(part, Said) and part.is_thought):
                yield from self._blocks.more(part)
        if piece.finish is not None:
            yield from self._blocks.end()
            self._stop = self._stopped(piece)

    def closing(self, usage: Usage) -> Iterable[dict[str, Any]]:
        yield {"type": "message_delta", "delta": self._stop, "usage": self._usage(usage)}
        yield {"type": "message_stop"}

    def failed(self, error: Refusal) -> Iterable[dict[str, Any]]:
        yield error_body(error)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        for piece in pieces:
            for _ in self.chunks(piece):
                pass  # the blocks are what is wanted
        return self._message(usage)

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "type": "message",
            "role": "assistant",
            "model": self._card.name,
            "content": self._blocks.content,
            **self._stop,
            "usage": self._usage(usage),
        }

    def _stopped(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
        if piece.finish is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if self._turn.num_calls else "end_turn", "stop_sequence": None}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        """Tokens found in the cache are not among `input_tokens`."""
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._turn.num_reasoning_tokens},
        }


class Blocks:
    """A message's content as far as it has come, and the events that told it."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open = ""  # a thought, text, a call by its index; none
        self._said: list[str] = []  # of the open block

    def more(self, part: Said | CallDelta) -> Iterator[dict[str, Any]]:
        if self._open != (key := key_of(part)):
            yield from self.end()
            yield self._begin(part)
            self._open = key
        if isinstance(part, CallDelta):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        elif part.is_thought:
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            delta = {"type": "text_delta", "text": part.text}
        self._said.append(part.arguments if isinstance(part, CallDelta) else part.text)
        yield self._delta(delta)

    def end(self) -> Iterator[dict[str, Any]]:
        """The open block ends, if there is one."""
        if not self._open:
            return
        block, said = self.content[-1], "".join(self._said)
        match block["type"]:
            case "tool_use":
                block["input"] = complete_ones(said)
            case "thinking":
                block["thinking"] = said
                block["signature"] = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
                yield self._delta({"type": "signature_delta", "signature": block["signature"]})
            case _:
                block["text"] = said
        yield {"type": "content_block_stop", "index": len(self.content) - 1}
        self._open = ""
        self._said.clear()

    def _begin(self, part: Said | CallDelta) -> dict[str, Any]:
        block: dict[str, Any]
        if isinstance(part, CallDelta):
            block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": part.name, "input": {}}
        elif part.is_thought:
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": "", "citations": None}
        self.content.append(block)
        return {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def complete_ones(arguments: str) -> dict[str, Any]:
    """The arguments that are complete, of an object's JSON that may break off anywhere."""
    found: dict[str, Any] = {}
    decoder, at = json.JSONDecoder(), 1
    try:
        while at < len(arguments):
            name, at = decoder.raw_decode(arguments, at)
            found[name], at = decoder.raw_decode(arguments, at + len(": "))
            at += len(", ")
    except json.JSONDecodeError:
        pass  # it breaks off, or was `{}`
    return found

"""The dialect of OpenAI's /v1/responses: a response of items, streamed as named and numbered events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from gateway.dialect import Dialect
from gateway.errors import Overloaded, Refusal
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.request import FinishReason
from gateway.responses.output import Output
from gateway.stream import NAMED, Framing
from gateway.text import Piece
from gateway.turn import Turn
from gateway.validate import Call

Event = dict[str, Any]


class ResponsesDialect(Dialect):
    framing: ClassVar[Framing] = NAMED

    def __init__(self, call: Call, card: ModelCard) -> None:
        self._call = call
        self._card = card
        self._created = int(time.time())
        self._turn = Turn(call, card)
        self._output = Output()
        self._status = "in_progress"
        self._num_events = 0
        self.marked = card.tags.ids if card.tags is not None else frozenset[int]()

    def opening(self) -> Iterable[Event]:
        for name in ("response.created", "response.in_progress"):
            yield self._numbered({"type": name, "response": self._response(None)})

    def chunks(self, piece: Piece) -> Iterable[Event]:
        for part in self._turn.take(piece).parts:
            yield from map(self._numbered, self._output.more(part))
        if piece.finish is not None:
            self._status = "incomplete" if piece.finish is FinishReason.LENGTH else "completed"
            yield from map(self._numbered, self._output.end(self._status))

    def closing(self, usage: Usage) -> Iterable[Event]:
        yield self._numbered({"type": f"response.{self._status}", "response": self._response(usage)})

    def failed(self, error: Refusal) -> Iterable[Event]:
        """What had come stays in the response, the item that was open as it was."""
        self._status = "failed"
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        told = {"code": code, "message": error.message}
        yield self._numbered({"type": "response.failed", "response": {**self._response(None), "error": told}})

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Event:
        for piece in pieces:
            for _ in self.chunks(piece):
                pass  # the items are what is wanted
        return self._response(usage)

    def _numbered(self, event: Event) -> Event:
        self._num_events += 1
        return {**event, "sequence_number": self._num_events - 1}

    def _response(self, usage: Usage | None) -> Event:
        is_cut = self._status == "incomplete"
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._card.name,
            "output": self._output.items,
            "usage": None if usage is None else self._usage(usage),
            **self._call.repeated,
        }

    def _usage(self, usage: Usage) -> Event:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._turn.num_reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

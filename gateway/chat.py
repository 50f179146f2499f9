"""The dialect of /v1/chat/completions: messages in, the assistant's next one out: thought, content, tool calls."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from gateway import openai_types
from gateway.dialect import Dialect
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.parsers.calls import CallDelta, Parsed
from gateway.request import FinishReason
from gateway.text import Piece
from gateway.turn import Turn
from gateway.validate import Call


class ChatDialect(Dialect):
    def __init__(self, call: Call, card: ModelCard) -> None:
        self._call = call
        self._card = card
        self._created = int(time.time())
        self._turns = [Turn(call, card) for _ in range(call.requests[0].n)]
        self.marked = card.tags.ids if card.tags is not None else frozenset[int]()

    def opening(self) -> Iterable[dict[str, Any]]:
        """The role of each choice, before any of its content."""
        for choice in range(len(self._turns)):
            delta = {"role": "assistant", "content": ""}
            chunk = self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])
            yield {**chunk, **self._prompt_token_ids()} if choice == 0 else chunk

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        delta = self._delta(self._turns[piece.choice].take(piece))
        if delta or piece.finish is not None or (piece.tokens and self._shows_tokens):
            yield self._chunk([self._choice(piece, {"delta": delta})])

    def closing(self, usage: Usage) -> Iterable[dict[str, Any]]:
        if self._call.include_usage:
            yield {**self._chunk([]), "usage": self._usage(usage)}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(piece, {"message": self._message(self._turns[piece.choice].take(piece))})
            for piece in pieces
        ]
        answer = self._envelope("chat.completion", choices)
        answer |= {"usage": self._usage(usage), **self._prompt_token_ids()}
        if (shown := self._call.num_prompt_logprobs) is not None:
            prompt, scores = self._call.requests[0].prompt, pieces[0].prompt_logprobs
            answer["prompt_logprobs"] = openai_types.prompt_logprobs(prompt, scores, shown, self._card)
        return answer

    # --- what was said -------------------------------------------------------------------------

    def _delta(self, parsed: Parsed) -> dict[str, Any]:
        """Only what there is."""
        delta = self._reasoning(parsed)
        if parsed.content:
            delta["content"] = parsed.content
        if parsed.calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in parsed.calls]
        return delta

    def _message(self, parsed: Parsed) -> dict[str, Any]:
        content = None if parsed.calls and not parsed.content else parsed.content
        message = {"role": "assistant", "content": content, "refusal": None, **self._reasoning(parsed)}
        return {**message, "tool_calls": [_call(call) for call in parsed.calls]} if parsed.calls else message

    def _reasoning(self, parsed: Parsed) -> dict[str, Any]:
        """Under both names that clients look for."""
        if not parsed.reasoning or not self._call.include_reasoning:
            return {}
        return {"reasoning": parsed.reasoning, "reasoning_content": parsed.reasoning}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        if self._card.tags is None:
            return usage.body()
        tokens = sum(choice.num_reasoning_tokens for choice in self._turns)
        return {**usage.body(), "completion_tokens_details": {"reasoning_tokens": tokens}}

    # --- around it -----------------------------------------------------------------------------

    @property
    def _shows_tokens(self) -> bool:
        return self._call.return_token_ids or self._call.requests[0].num_logprobs is not None

    def _choice(self, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._call.requests[0].num_logprobs is not None:
            logprobs = openai_types.chat_logprobs(piece, self._card, as_ids=self._call.tokens_as_ids)
        has_called = (
            piece.finish is FinishReason.STOP
            and self._turns[piece.choice].num_calls > 0
            and not self._call.is_call_named  # as OpenAI has it: then nothing was left to the model
        )
        choice = {
            "index": piece.choice,
            **content,
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if has_called else openai_types.finish_reason(piece),
            "stop_reason": piece.stop_reason,
        }
        return {**choice, "token_ids": list(piece.tokens)} if self._call.return_token_ids else choice

    def _prompt_token_ids(self) -> dict[str, list[int]]:
        if not self._call.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._call.requests[0].prompt)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._envelope("chat.completion.chunk", choices)
        return {**chunk, "usage": None} if self._call.include_usage else chunk

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return openai_types.envelope(kind, self._call.id, self._card, self._created, choices)


def _call(call: CallDelta) -> dict[str, Any]:
    """Id, type and name come once, with the first of a call."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}

"""The dialect of /v1/chat/completions: messages in, the assistant's next one out, as it was generated."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from gateway import openai_types
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.text import Piece
from gateway.validate import Call


class ChatDialect:
    def __init__(self, call: Call, card: ModelCard) -> None:
        self._call = call
        self._card = card
        self._created = int(time.time())

    def opening(self) -> Iterable[dict[str, Any]]:
        """The role of each choice, before any of its content."""
        for choice in range(self._call.requests[0].n):
            delta = {"role": "assistant", "content": ""}
            chunk = self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])
            yield {**chunk, **self._prompt_token_ids()} if choice == 0 else chunk

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.text or piece.finish is not None or (piece.tokens and self._shows_tokens):
            delta = {"content": piece.text} if piece.text else {}
            yield self._chunk([self._choice(piece, {"delta": delta})])

    def closing(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.body()}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(piece, {"message": {"role": "assistant", "content": piece.text, "refusal": None}})
            for piece in pieces
        ]
        return {**self._envelope("chat.completion", choices), "usage": usage.body(), **self._prompt_token_ids()}

    @property
    def _shows_tokens(self) -> bool:
        return self._call.return_token_ids or self._call.requests[0].num_logprobs is not None

    def _choice(self, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._call.requests[0].num_logprobs is not None:
            logprobs = openai_types.chat_logprobs(piece, self._card, as_ids=self._call.tokens_as_ids)
        choice = {
            "index": piece.choice,
            **content,
            "logprobs": logprobs,
            "finish_reason": openai_types.finish_reason(piece),
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

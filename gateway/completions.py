"""The dialect of /v1/completions: text continues the prompt, one choice per prompt and sequence."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from gateway import openai_types
from gateway.dialect import Dialect
from gateway.echo import Echo, before
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.request import PromptLogprob
from gateway.text import Piece
from gateway.validate import Call


class CompletionDialect(Dialect):
    """Text as it was generated, tags included, after its prompt where that is to be said again."""

    marked: frozenset[int] = frozenset()

    def __init__(self, call: Call, card: ModelCard) -> None:
        self._call = call
        self._card = card
        self._created = int(time.time())
        self._echoes = {r.request_id: Echo(r, card) for r in call.requests} if call.echo else {}
        self._unsaid = set(range(len(call.requests) * call.requests[0].n)) if call.echo else set()

    def opening(self) -> Iterable[dict[str, Any]]:
        """Only the prompts' token ids, where asked for."""
        if self._call.return_token_ids:
            for choice in range(len(self._call.requests) * self._call.requests[0].n):
                yield self._chunk([self._choice(Piece(choice, ""), with_prompt=True)])

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if piece.choice in self._unsaid:
            self._unsaid.remove(piece.choice)
            yield self._chunk([self._choice(Piece(piece.choice, ""), echoed=piece.prompt_logprobs)])
        if piece.text or piece.finish is not None or (piece.tokens and self._shows_tokens):
            yield self._chunk([self._choice(piece)])

    def closing(self, usage: Usage) -> Iterable[dict[str, Any]]:
        if self._call.include_usage:
            yield {**self._chunk([]), "usage": usage.body()}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        with_prompt = self._call.return_token_ids
        choices = [
            self._choice(piece, with_prompt=with_prompt, echoed=piece.prompt_logprobs if self._call.echo else None)
            for piece in pieces
        ]
        return {**self._envelope(choices), "usage": usage.body()}

    @property
    def _shows_tokens(self) -> bool:
        return self._call.return_token_ids or self._call.requests[0].num_logprobs is not None

    def _choice(
        self, piece: Piece, *, with_prompt: bool = False, echoed: Sequence[PromptLogprob] | None = None
    ) -> dict[str, Any]:
        """`echoed`: the prompt comes before the piece, with these logprobs if any are asked for."""
        request, as_ids = self._call.request_of(piece.choice), self._call.tokens_as_ids
        echo, logprobs, count = self._echoes.get(request.request_id), None, request.num_logprobs
        if count is not None:
            begin = len(echo.text) if echo is not None else 0
            logprobs = openai_types.completion_logprobs(piece, self._card, count, as_ids=as_ids, begin=begin)
            if echo is not None and echoed is not None:
                logprobs = before(echo.logprobs(echoed, count, as_ids=as_ids), logprobs)
        choice = {
            "index": piece.choice,
            "text": echo.text + piece.text if echo is not None and echoed is not None else piece.text,
            "logprobs": logprobs,
            "finish_reason": openai_types.finish_reason(piece),
            "stop_reason": piece.stop_reason,
        }
        if self._call.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        if with_prompt:
            choice["prompt_token_ids"] = list(request.prompt)
        if (shown := self._call.num_prompt_logprobs) is not None:  # then the answer is whole
            choice["prompt_logprobs"] = openai_types.prompt_logprobs(
                request.prompt, piece.prompt_logprobs, shown, self._card
            )
        return choice

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._envelope(choices)
        return {**chunk, "usage": None} if self._call.include_usage else chunk

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return openai_types.envelope("text_completion", self._call.id, self._card, self._created, choices)

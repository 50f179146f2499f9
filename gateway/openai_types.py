"""The JSON of OpenAI's API: what our values look like to a client. Dictionaries, ready for orjson."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.model_card import ModelCard
from gateway.text import Piece
from gateway.tokens import shown_token

_LOGPROB_MIN = -9999.0  # JSON has no infinity


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompts: those that no choice had to compute

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def envelope(
    kind: str, call_id: str, card: ModelCard, created: int, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    """What every answer and chunk of a call begins with; `created` in seconds since 1970."""
    return {
        "id": call_id,
        "object": kind,
        "created": created,
        "model": card.name,
        "system_fingerprint": card.fingerprint,
        "choices": choices,
    }


def finish_reason(piece: Piece) -> str | None:
    return None if piece.finish is None else piece.finish.value


def completion_logprobs(piece: Piece, card: ModelCard, num_logprobs: int, *, as_ids: bool) -> dict[str, Any]:
    """Parallel lists over the piece's tokens. The alternatives include the sampled token, as OpenAI's do."""
    names = [shown_token(card.tokens, token, as_id=as_ids) for token in piece.tokens]
    sampled = [_finite(value) for value in piece.logprobs]
    alternatives = None
    if num_logprobs:
        alternatives = []
        for name, logprob, top in zip(names, sampled, piece.top_logprobs, strict=True):
            likeliest: dict[str, float] = {}
            for token, value in top:
                likeliest.setdefault(shown_token(card.tokens, token, as_id=as_ids), _finite(value))
            alternatives.append({**likeliest, name: logprob})
    return {
        "tokens": names,
        "token_logprobs": sampled,
        "top_logprobs": alternatives,
        "text_offset": list(piece.offsets),
    }


def chat_logprobs(piece: Piece, card: ModelCard, *, as_ids: bool) -> dict[str, Any]:
    """One object per token, each with the alternatives at its position, likeliest first."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelling = card.tokens.spelling_of(token) if card.tokens is not None else b""
        return {
            "token": shown_token(card.tokens, token, as_id=as_ids),
            "logprob": _finite(logprob),
            "bytes": list(spelling),
        }

    tops: Sequence[tuple[tuple[int, float], ...]] = piece.top_logprobs or [()] * len(piece.tokens)
    return {
        "content": [
            {**entry(token, logprob), "top_logprobs": [entry(*one) for one in top]}
            for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True)
        ],
        "refusal": None,
    }


def model(card: ModelCard, model_len_max: int) -> dict[str, Any]:
    """`max_model_len` in tokens, as other engines call it."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "expertmesh",
        "max_model_len": model_len_max,
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOGPROB_MIN)

"""The JSON of OpenAI's API: what our values look like to a client. Dictionaries, ready for orjson."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.model_card import ModelCard
from gateway.request import PromptLogprob
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


def completion_logprobs(
    piece: Piece, card: ModelCard, num_logprobs: int, *, as_ids: bool, begin: int = 0
) -> dict[str, Any]:
    """Parallel lists over the piece's tokens. `begin`: where the choice's own text begins in what is shown."""
    lists = token_lists(piece.tokens, piece.logprobs, piece.top_logprobs, card, num_logprobs, as_ids=as_ids)
    return {**lists, "text_offset": [begin + offset for offset in piece.offsets]}


def token_lists(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[Sequence[tuple[int, float]]],
    card: ModelCard,
    num_logprobs: int,
    *,
    as_ids: bool,
) -> dict[str, Any]:
    """Names, logprobs and alternatives, which include the token itself, as OpenAI's do."""
    names = [shown_token(card.tokens, token, as_id=as_ids) for token in tokens]
    values = [_finite(value) for value in logprobs]
    alternatives = None
    if num_logprobs:
        alternatives = []
        for name, logprob, top in zip(names, values, tops, strict=True):
            likeliest: dict[str, float] = {}
            for token, value in top:
                likeliest.setdefault(shown_token(card.tokens, token, as_id=as_ids), _finite(value))
            alternatives.append({**likeliest, name: logprob})
    return {"tokens": names, "token_logprobs": values, "top_logprobs": alternatives}


def prompt_logprobs(
    prompt: Sequence[int], scores: Sequence[PromptLogprob], num_logprobs: int, card: ModelCard
) -> list[dict[str, Any] | None]:
    """As vLLM has them: for each token of the prompt an object by token id, of itself and the likeliest; null for
    the first, before which nothing comes."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        decoded = shown_token(card.tokens, token)
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": decoded}

    shown: list[dict[str, Any] | None] = [None]
    for token, score in zip(prompt[1:], scores, strict=True):
        top = enumerate(score.top[:num_logprobs], 1)
        shown.append(
            {
                str(token): entry(token, score.logprob, score.rank),
                **{str(other): entry(other, value, rank) for rank, (other, value) in top if other != token},
            }
        )
    return shown


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

"""The prompt as a completion says it again: its text, and where asked for what the model made of each token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from gateway import openai_types
from gateway.model_card import ModelCard
from gateway.request import GenerateRequest, PromptLogprob
from gateway.tokens import shown_token


class Echo:
    """Of one request. Special tokens are in the text by name; without a tokenizer there is none."""

    def __init__(self, request: GenerateRequest, card: ModelCard) -> None:
        self._request, self._card = request, card
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, self._offsets = "", []
        for token in request.prompt:
            self._offsets.append(len(text))
            text += self._decoder.decode(card.tokens.spelling_of(token)) if card.tokens is not None else ""
        self.text = text + self._decoder.decode(b"", final=True)

    def logprobs(self, scores: Sequence[PromptLogprob], num_logprobs: int, *, as_ids: bool) -> dict[str, Any]:
        """As of generated tokens; there are none of the prompt's first, before which nothing comes."""
        rest = openai_types.token_lists(
            self._request.prompt[1:],
            [score.logprob for score in scores],
            [score.top[:num_logprobs] for score in scores],
            self._card,
            num_logprobs,
            as_ids=as_ids,
        )
        first = shown_token(self._card.tokens, self._request.prompt[0], as_id=as_ids)
        return {
            "tokens": [first, *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": None if rest["top_logprobs"] is None else [None, *rest["top_logprobs"]],
            "text_offset": self._offsets,
        }


def before(echoed: dict[str, Any], generated: dict[str, Any]) -> dict[str, Any]:
    """The lists of a prompt's tokens and of those generated as one."""
    return {
        name: None if generated[name] is None else [*found, *generated[name]] for name, found in echoed.items()
    }

"""Text, token ids or messages to a prompt: what the checkpoint's tokenizer and template can read of it.

Raises BadRequest or NotFound, naming field, value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway import template
from gateway.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    accepted_for,
    read,
)
from gateway.config import GatewayConfig
from gateway.errors import BadRequest, NotFound, invalid
from gateway.model_card import ModelCard
from gateway.tokens import Tokens
from gateway.tools import Tool, forced_by, read_tools, shown_to_template

Prompt = tuple[int, ...]


class Prompts:
    def __init__(self, card: ModelCard, config: GatewayConfig) -> None:
        self._card = card
        self._config = config

    def of_completion(self, prompt: Any) -> list[Prompt]:
        """A string, a list of strings, a list of token ids, or a list of such lists."""
        if isinstance(prompt, str):
            return [self._encoded(prompt, "prompt")]
        if not isinstance(prompt, list) or not prompt:
            raise invalid("prompt", prompt, accepted_for(CompletionBody, "prompt"))
        if not isinstance(prompt[0], str | list):
            return [self._checked(prompt, "prompt")]
        if len(prompt) > self._config.prompts_max:
            raise invalid("prompt", prompt, f"at most {self._config.prompts_max} prompts in one call")
        return [
            self._encoded(one, f"prompt[{i}]") if isinstance(one, str) else self._checked(one, f"prompt[{i}]")
            for i, one in enumerate(prompt)
        ]

    def of_chat(self, messages: Any, tools: Sequence[Tool] = ()) -> Prompt:
        if not isinstance(messages, list):
            raise invalid("messages", messages, accepted_for(ChatBody, "messages"))
        if self._card.template is None or self._card.tokens is None:
            missing = "tokenizer.json" if self._card.tokens is None else "chat template"
            raise BadRequest(
                f"messages cannot be read: this checkpoint has no {missing}; accepted: /v1/completions with "
                "token ids",
                param="messages",
                code="no_tokenizer",
            )
        text = self._card.template.render(template.normalise(messages), shown_to_template(tools))
        return self._encoded(text, "messages")

    def tools(self, tools: Any, choice: Any) -> tuple[Tool, ...]:
        """Those the model is shown and may call."""
        if tools is None:
            if choice not in (None, "none"):
                raise invalid("tool_choice", choice, 'null or "none", unless tools are given')
            return ()
        offered = read_tools(tools, self._config.tools_max)
        forced_by(choice, offered)  # refuses what is no choice
        if self._card.tags is None:
            raise BadRequest(
                "tools cannot be called: this checkpoint's tokenizer has no <minimax:tool_call>; accepted: null",
                param="tools",
                code="unsupported_parameter",
            )
        return offered if choice != "none" else ()

    def tokenizer(self, param: str, accepted: str) -> Tokens:
        """Raises BadRequest where the checkpoint has none."""
        if self._card.tokens is None:
            raise BadRequest(
                f"{param} needs text, but this checkpoint has no tokenizer.json; accepted: {accepted}",
                param=param,
                code="no_tokenizer",
            )
        return self._card.tokens

    # --- /tokenize and /detokenize -------------------------------------------------------------

    def tokenised(self, raw: dict[str, Any], model_len_max: int) -> dict[str, Any]:
        """The answer of /tokenize: the tokens that the generating endpoints see of the same prompt or messages."""
        body, _ = read(raw, TokenizeBody)
        check_model(body, self._card)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", body.prompt, "a string, or messages in its place")
        if body.prompt is None:
            ids = self.of_chat(body.messages, self.tools(body.tools, None))
        elif body.tools is not None:
            raise invalid("tools", body.tools, "null, unless messages are given")
        else:
            tokens = self.tokenizer("prompt", "nothing else")
            ids = tuple(tokens.encode(body.prompt, add_special=bool(body.add_special_tokens)))
        names = None
        if body.return_token_strs:
            names = [self.tokenizer("prompt", "nothing else").name_of(token) for token in ids]
        return {"count": len(ids), "max_model_len": model_len_max, "tokens": ids, "token_strs": names}

    def detokenised(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The answer of /detokenize: the text, special tokens by name."""
        body, _ = read(raw, DetokenizeBody)
        check_model(body, self._card)
        tokens = self.tokenizer("tokens", "nothing else")
        if body.tokens is None:
            raise invalid("tokens", None, accepted_for(DetokenizeBody, "tokens"))
        return {"prompt": tokens.spelled(list(token_ids(body.tokens, "tokens", self._card)))}

    # --- inside --------------------------------------------------------------------------------

    def _encoded(self, text: str, param: str) -> Prompt:
        tokens = self.tokenizer(param, "a list of token ids")
        if not text:
            raise invalid(param, text, "at least one character")
        return tuple(tokens.encode(text))

    def _checked(self, ids: Any, param: str) -> Prompt:
        if not isinstance(ids, list) or not ids:
            raise invalid(param, ids, "a list of at least one token id, or a string")
        return token_ids(ids, param, self._card)


def token_ids(values: list[Any], param: str, card: ModelCard) -> tuple[int, ...]:
    for number, value in enumerate(values):
        if type(value) is not int or not 0 <= value < card.vocab_size:
            raise invalid(f"{param}[{number}]", value, f"a token id from 0 to {card.vocab_size - 1}")
    return tuple(values)


def check_model(body: Body, card: ModelCard) -> None:
    if body.model not in (None, card.name):
        raise unknown_model(body.model, card)


def unknown_model(name: str | None, card: ModelCard) -> NotFound:
    """The same answer from every endpoint."""
    error = invalid("model", name, card.name)
    return NotFound(error.message, param="model", code="model_not_found")

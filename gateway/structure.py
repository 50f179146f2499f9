"""Requests whose answers are held to a grammar: what the client wants, judged, with the thought before it.

Decisions a client can see:
- a thought comes first where the prompt opens one, and is free; where the answer is held to a grammar it may take
  half of `max_tokens`, or `thinking_token_budget`, and is then ended, so that the answer has room;
- a forced call (`tool_choice` required or a name) is all that follows the thought; a response_format beside it is
  for the turn after the tool's answer, and does not matter in this one;
- a response_format beside tools that may be called is for answers that call none;
- the answer must be able to end: `ignore_eos` is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gateway import grammar, tool_grammar
from gateway.bodies import ChatBody, GenerateBody
from gateway.config import GatewayConfig
from gateway.errors import BadRequest, invalid
from gateway.grammar import Part
from gateway.model_card import ModelCard
from gateway.request import GenerateRequest, Grammar
from gateway.tools import Tool, forced_by

Requests = tuple[GenerateRequest, ...]


class Structure:
    """Raises BadRequest, naming field, value and what is accepted."""

    def __init__(self, card: ModelCard, config: GatewayConfig) -> None:
        self._card = card
        self._config = config

    def of_completion(self, body: GenerateBody, requests: Requests) -> Requests:
        if body.thinking_token_budget is not None:
            raise invalid("thinking_token_budget", body.thinking_token_budget, "null: a completion has no thought")
        part = grammar.wanted(body)
        if part is None:
            return requests
        text = self._judged([part], body, after_thought=False)
        return tuple(dataclasses.replace(one, grammar=Grammar(text, self._eos)) for one in requests)

    def of_chat(self, body: ChatBody, tools: Sequence[Tool], request: GenerateRequest) -> GenerateRequest:
        parts, budget, tags = self._parts(body, tools), body.thinking_token_budget, self._card.tags
        if budget is not None and tags is None:
            raise BadRequest(
                "thinking_token_budget has no meaning: this checkpoint's tokenizer has no <think>; accepted: null",
                param="thinking_token_budget",
                code="unsupported_parameter",
            )
        thinks = tags is not None and tags.leave_thought_open(request.prompt)
        if not parts and (budget is None or not thinks):
            return request
        text = self._judged(parts, body, after_thought=thinks) if parts else ""
        if tags is None or not thinks:
            return dataclasses.replace(request, grammar=Grammar(text, self._eos))
        held = Grammar(
            text,
            self._eos,
            thought_ends=(tags.think_end, tags.calls),
            thought_tokens_max=request.max_tokens // 2 if budget is None else budget,
            barred=(*self._eos, tags.calls) if text else (),
        )
        return dataclasses.replace(request, grammar=held)

    @property
    def _eos(self) -> tuple[int, ...]:
        return tuple(sorted(self._card.eos))

    def _parts(self, body: ChatBody, tools: Sequence[Tool]) -> list[Part]:
        """What the answer may be, one of these; none: anything."""
        wanted, one = grammar.wanted(body), body.parallel_tool_calls is False
        if forced := forced_by(body.tool_choice, tools):
            one = one or body.tool_choice != "required"
            return [self._calls(forced, one=one, param="tool_choice")]
        if wanted is None:
            return []
        return [wanted, self._calls(tools, one=one, param="tools")] if tools else [wanted]

    def _calls(self, tools: Sequence[Tool], *, one: bool, param: str) -> Part:
        assert self._card.tags is not None  # else tools were refused
        return tool_grammar.calls_part(tools, self._card.tags, one=one, param=param)

    def _judged(self, parts: list[Part], body: GenerateBody, *, after_thought: bool) -> str:
        param, judge, config = parts[0].param, self._card.judge, self._config
        if judge is None:
            raise BadRequest(
                f"{param} cannot be held to: this checkpoint has no tokenizer.json or no end; accepted: null",
                param=param,
                code="no_tokenizer",
            )
        if body.ignore_eos:
            raise invalid("ignore_eos", True, f"false, where {param} says how the answer ends")
        text = grammar.whole(parts, after_thought=after_thought)
        judge.check(text, param, config.grammar_bytes_max, config.grammar_s_max)
        return text

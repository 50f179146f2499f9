"""Answers of the family for parser tests: written by the template, cut into deltas, read by the parser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import model.synthetic_tokenizer
from gateway.parsers.calls import Kinds, Parsed
from gateway.parsers.minimax_m2 import AnswerParser
from gateway.parsers.tags import find_tags
from gateway.request import FinishReason, GenerateRequest, Sampling, TokenDelta
from gateway.template import ChatTemplate, normalise
from gateway.text import ChoiceText
from gateway.tokens import Tokens
from tests.unit.gateway_world import tokenizer_json

TOKENS = Tokens(Tokenizer.from_str(tokenizer_json()))
_FOUND = find_tags(TOKENS.id_of)
assert _FOUND is not None
TAGS = _FOUND
EOS = TOKENS.id_of("[e~[") or 0
TEMPLATE = ChatTemplate(Path(model.synthetic_tokenizer.CHAT_TEMPLATE).read_text(), {})
USER = {"role": "user", "content": "Hi"}
PROMPT = TEMPLATE.render(normalise([USER]))


def written(answer: dict[str, Any]) -> str:
    """What the model must have said, after PROMPT and before eos, for the template to show this answer."""
    text = TEMPLATE.render(normalise([USER, answer]))
    assert text.startswith(PROMPT)
    return text.removeprefix(PROMPT).rpartition("[e~[\n]~b]ai")[0]


def read(
    ids: Sequence[int],
    tools: dict[str, Kinds],
    cuts: Sequence[int] = (),
    *,
    finish: FinishReason = FinishReason.STOP,
    stop: tuple[str, ...] = (),
    in_thought: bool = True,
    calls_max: int | None = None,
    each: list[Parsed] | None = None,
) -> tuple[Parsed, AnswerParser]:
    """What an answer says whose tokens come in deltas cut at `cuts`; eos comes last where `finish` is STOP.

    `each`: where what each of them says is put, instead of all in one.
    """
    ids = [*ids, EOS] if finish is FinishReason.STOP else list(ids)
    request = GenerateRequest("r", (1,), Sampling(), 10**6, stop=stop, stop_token_ids=frozenset({EOS}))
    text = ChoiceText(0, request, TOKENS, frozenset({EOS}), TAGS.ids)
    parser, out = AnswerParser(TAGS, tools, in_thought=in_thought, calls_max=calls_max), Parsed()
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        last = finish if end == len(ids) else None
        if each is not None:
            out = Parsed()
            each.append(out)
        piece = text.take(TokenDelta("r", 0, 1, begin, tuple(ids[begin:end]), finish=last))
        parser.take(piece.text, piece.marks, out)
        if piece.finish is not None:
            parser.end(out, is_cut=piece.finish is FinishReason.LENGTH or piece.stop_reason is not None)
            break
    return out, parser


def calls(parsed: Parsed) -> list[tuple[str | None, str]]:
    """Name and arguments of each call; pieces of several calls may alternate."""
    names: dict[int, str | None] = {}
    arguments: dict[int, str] = {}
    for call in parsed.calls:
        names.setdefault(call.index, call.name)
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(len(names)))
    return [(names[index], arguments[index]) for index in names]

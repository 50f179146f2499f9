"""The assistant's turn as far as it has come: what of it is thought, content and calls, in whichever dialect."""

from __future__ import annotations

from gateway.model_card import ModelCard
from gateway.parsers.calls import Parsed
from gateway.parsers.minimax_m2 import AnswerParser
from gateway.request import FinishReason
from gateway.text import Piece
from gateway.validate import Call


class Turn:
    """Of one choice. Without tags in the tokenizer all of it is content."""

    def __init__(self, call: Call, card: ModelCard) -> None:
        self._parser: AnswerParser | None = None
        if card.tags is not None:
            self._parser = AnswerParser(
                card.tags,
                {tool.name: tool.kinds for tool in call.tools},
                in_thought=card.tags.leave_thought_open(call.requests[0].prompt),
                calls_max=None if call.parallel_tool_calls else 1,
            )
        self._num_tokens = 0

    @property
    def num_calls(self) -> int:
        return self._parser.num_calls if self._parser is not None else 0

    @property
    def num_reasoning_tokens(self) -> int:
        return self._parser.num_reasoning_tokens(self._num_tokens) if self._parser is not None else 0

    def take(self, piece: Piece) -> Parsed:
        parsed = Parsed()
        if self._parser is None:
            parsed.say(piece.text)
            return parsed
        ends_by_token = piece.finish is FinishReason.STOP and not isinstance(piece.stop_reason, str)
        self._num_tokens += len(piece.tokens)
        self._parser.take(piece.text, piece.marks, parsed)
        if piece.finish is not None:
            self._num_tokens -= ends_by_token  # a stop token is no thought
            self._parser.end(parsed, is_cut=not ends_by_token)
        return parsed

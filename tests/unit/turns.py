"""A turn that thinks, says something and calls two tools, for tests of APIs that tell it in different words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model.synthetic_tokenizer
from gateway.model_card import ModelCard
from tests.unit.gateway_world import card_of, write_checkpoint

CONTEXT = 2048
CALL = (
    '<invoke name="weather">\n<parameter name="city">Köln "Süd"</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n'
)
THOUGHT = "The user wants\nweather."
ANSWER = (
    f'{THOUGHT}\n</think>\n\nLet me look.\n<minimax:tool_call>\n{CALL}<invoke name="weather">\n</invoke>\n'
    "</minimax:tool_call>"
)
ARGUMENTS = [{"city": 'Köln "Süd"', "days": 2}, {}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
ANTHROPIC_USER: Any = {"role": "user", "content": "Weather in Köln?"}
ANTHROPIC_TOOL: Any = {"name": "weather", "description": "Says the weather.", "input_schema": PARAMETERS}


def thinking_card(folder: Path) -> ModelCard:
    """With the family's template: a prompt ends inside a thought."""
    template = Path(model.synthetic_tokenizer.CHAT_TEMPLATE).read_text()
    return card_of(write_checkpoint(folder, template, temperature=0.0), context=CONTEXT)


def tokens_of(card: ModelCard, text: str) -> tuple[int, ...]:
    assert card.tokens is not None
    return tuple(card.tokens.encode(text))

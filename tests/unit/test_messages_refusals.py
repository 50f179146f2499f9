"""What Anthropic's Messages API refuses here: by the names of its own fields, whatever chat calls them."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.errors import BadRequest
from gateway.messages.body import call_of
from gateway.model_card import ModelCard
from gateway.validate import Validator
from tests.unit.turns import ANTHROPIC_TOOL as TOOL
from tests.unit.turns import ANTHROPIC_USER as USER
from tests.unit.turns import CONTEXT, thinking_card


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return thinking_card(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def validator(card: ModelCard) -> Validator:
    return Validator(card, GatewayConfig(), CONTEXT)


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 1000, "messages": [USER], **fields}


def said_by_user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def called_with(arguments: Any) -> dict[str, Any]:
    """A conversation in which a tool was used and has no result."""
    block = {"type": "tool_use", "id": "t", "name": "f", "input": arguments}
    return {"messages": [USER, {"role": "assistant", "content": [block]}, USER]}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages is a list of 0 items; accepted: a list of at least one message"),
        ({"messages": [{"role": "robot"}]}, 'messages[0].role is "robot"; accepted: user, assistant, system'),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, 'messages[1].role is "assistant"'),
        (said_by_user({"type": "image"}), 'messages[0].content[0].type is "image"'),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is 3"),
        (
            said_by_user({"type": "tool_result", "tool_use_id": "t"}),
            'messages[0].content[0].tool_use_id is "t"; accepted: the id of a tool_use in the message before',
        ),
        (
            called_with({}),
            'accepted: a tool_result for each tool_use before it, "t" too',
        ),
        (
            called_with("x"),
            'messages[1].content[0].input is "x"; accepted: a JSON object',
        ),
        ({"system": 3}, "system is 3; accepted: a string, or a list of text parts"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 'tools[0].type is "bash_20250124"'),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, 'tools[0].name is "a b"; accepted: 1 to 128'),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is null"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, 'tool_choice.name is "g"; accepted:'),
        ({"tool_choice": {"type": "must"}}, 'tool_choice.type is "must"; accepted: auto, any, tool or none'),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "at least 0 and below max_tokens, 1000"),
        ({"thinking": {"type": "deep"}}, 'thinking.type is "deep"; accepted: enabled, disabled or adaptive'),
        ({"stop_sequences": [""]}, 'stop_sequences[0] is ""; accepted: a string of 1 to'),
        ({"output_config": {"format": {"type": "json_schema", "schema": 3}}}, "output_config.format.schema is 3"),
        ({"max_tokens": 0}, "max_tokens is 0; accepted: an integer of at least 1"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id is 3; accepted: a string"),
        ({"mcp_servers": [{}]}, "mcp_servers is a list of 1 items, which is not supported here"),
        ({"max_tokens": 9999}, "max_tokens is 9999; accepted: at most"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_anthropics_names(
    validator: Validator, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        call_of(validator, asked(**fields))
    assert sentence in caught.value.message

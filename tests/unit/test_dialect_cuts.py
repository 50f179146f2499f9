"""However an answer is cut into deltas, Anthropic's blocks and OpenAI's items are those of the whole.

And so are those that a client puts together from their events.
"""

from __future__ import annotations

import json
import random
from typing import Any

from gateway.messages.dialect import Blocks, complete_ones
from gateway.parsers.calls import Parsed
from gateway.request import FinishReason
from gateway.responses.output import Output
from tests.unit.answers import TOKENS, read
from tests.unit.conversations import Conversation, conversation

CONVERSATIONS = 40


def parts_of(made: Conversation, ids: list[int], cuts: list[int]) -> list[Parsed]:
    finish = FinishReason.LENGTH if made.is_cut else FinishReason.STOP
    each: list[Parsed] = []
    read(ids, made.tools, cuts, finish=finish, stop=made.stop, in_thought=made.in_thought, each=each)
    return each


def blocks_of(parsed: list[Parsed]) -> list[dict[str, Any]]:
    """As the gateway has them, and as its events have them, without ids."""
    blocks, told = Blocks(), list[dict[str, Any]]()
    events = [event for one in parsed for part in one.parts for event in blocks.more(part)] + list(blocks.end())
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(told)
                told.append({**event["content_block"], "said": ""})
            case "content_block_delta":
                (name,) = set(event["delta"]) - {"type"}
                assert event["index"] == len(told) - 1
                if name == "signature":
                    told[-1]["signature"] = event["delta"][name]
                else:
                    told[-1]["said"] += event["delta"][name]
    for block, built in zip(blocks.content, told, strict=True):
        said = built.pop("said")
        name = {"text": "text", "thinking": "thinking", "tool_use": "input"}[built["type"]]
        built[name] = complete_ones(said) if name == "input" else said
        assert built == block
    return [{name: value for name, value in block.items() if name != "id"} for block in blocks.content]


def items_of(parsed: list[Parsed], status: str) -> list[dict[str, Any]]:
    """Likewise."""
    output, told = Output(), list[dict[str, Any]]()
    events = [event for one in parsed for part in one.parts for event in output.more(part)]
    for event in [*events, *output.end(status)]:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(told) - (kind != "output_item.added")
        if kind == "output_item.added":
            told.append({"id": event["item"]["id"], "said": ""})
        elif kind.endswith(".delta"):
            assert event["item_id"] == told[-1]["id"]
            told[-1]["said"] += event["delta"]
        elif kind == "output_item.done":
            told[-1]["item"] = json.loads(json.dumps(event["item"]))
    for item, built in zip(output.items, told, strict=True):
        assert built["item"] == item
        assert built["said"] == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    hidden = ("id", "call_id")
    return [{name: value for name, value in item.items() if name not in hidden} for item in output.items]


def test_no_cut_changes_blocks_or_items() -> None:
    kinds: set[str] = set()
    for seed in range(CONVERSATIONS):
        chance = random.Random(seed)
        made = conversation(chance)
        ids = TOKENS.encode(made.text)
        if len(ids) < 2:
            continue
        status = "incomplete" if made.is_cut else "completed"
        whole = parts_of(made, ids, [])
        blocks, items = blocks_of(whole), items_of(whole, status)
        kinds |= {block["type"] for block in blocks} | {item["status"] for item in items}
        ways = [list(range(1, len(ids)))]
        ways += [sorted(chance.sample(range(1, len(ids)), chance.randrange(1, len(ids)))) for _ in range(5)]
        for cuts in ways:
            parsed = parts_of(made, ids, cuts)
            assert blocks_of(parsed) == blocks, (seed, cuts, made.text)
            assert items_of(parsed, status) == items, (seed, cuts, made.text)
    assert kinds == {"text", "thinking", "tool_use", "completed", "incomplete"}

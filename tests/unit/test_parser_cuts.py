"""However an answer is cut into deltas, it says what the whole says: every cut, every token, random ones.

A share of the conversations that `make soak` tries in thousands.
"""

from __future__ import annotations

import json
import random
from typing import Any

from gateway.request import FinishReason
from tests.unit.answers import TOKENS, calls, read
from tests.unit.conversations import Conversation, conversation

CONVERSATIONS = 25
MULTI_CUTS = 100


def assert_cuts_change_nothing(seed: int) -> tuple[int, int]:
    """Of one conversation; the tokens it had, and the ways it was cut in."""
    chance = random.Random(seed)
    made = conversation(chance)
    ids = TOKENS.encode(made.text)
    whole = said(made, ids, [])
    if made.expected is not None:
        reasoning, content, called = whole
        assert (reasoning, content) == made.expected[:2], (seed, made.text)
        assert [(name, json.loads(arguments)) for name, arguments in called] == made.expected[2], (seed, made.text)
    ways = [[cut] for cut in range(1, len(ids))]
    ways.append(list(range(1, len(ids))))
    for _ in range(MULTI_CUTS if len(ids) > 1 else 0):
        ways.append(sorted(chance.sample(range(1, len(ids)), chance.randrange(1, len(ids)))))
    for way in ways if ids else []:
        assert said(made, ids, way) == whole, (seed, way, made.text)
    return len(ids), len(ways)


def said(made: Conversation, ids: list[int], cuts: list[int]) -> tuple[str, str, list[Any]]:
    finish = FinishReason.LENGTH if made.is_cut else FinishReason.STOP
    out, _ = read(ids, made.tools, cuts, finish=finish, stop=made.stop, in_thought=made.in_thought)
    return out.reasoning, out.content, calls(out)


def test_no_cut_changes_what_a_conversation_says() -> None:
    """And the whole says what was meant."""
    for seed in range(CONVERSATIONS):
        assert_cuts_change_nothing(seed)


def test_the_conversations_have_all_there_is_to_try() -> None:
    """Otherwise the cuts would prove little."""
    made = [conversation(random.Random(seed)) for seed in range(300)]
    for wanted in ("<invoke name='", "<invoke name=run", 'name="rm"', "again\n</think>", "</think> is text"):
        assert any(wanted in one.text for one in made), wanted
    whole = [one.expected for one in made if one.expected is not None]
    assert any(len(called) > 2 for _, _, called in whole)
    assert any(not in_thought for in_thought in (one.in_thought for one in made))
    values = [value for _, _, called in whole for _, arguments in called for value in arguments.values()]
    assert {type(value) for value in values} == {str, int, float, bool, type(None), dict, list}

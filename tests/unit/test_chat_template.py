"""The chat template of made checkpoints renders the family's format, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

import model.synthetic_tokenizer

CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": {"city": "Köln", "days": 2, "deep": {"a": None}}},
}
USER = {"role": "user", "content": "Hi"}
SYSTEM = "]~!b[]~b]system\nYou are a helpful assistant.[e~[\n"
ASK = SYSTEM + "]~b]user\nHi[e~[\n"


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def render(messages: list[dict[str, Any]], **context: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=True: json.dumps(value, ensure_ascii=ensure_ascii)
    environment.globals["raise_exception"] = raise_exception
    source = Path(model.synthetic_tokenizer.CHAT_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(messages=messages, **context)


def test_prompt_ends_inside_an_open_thought() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    expected = "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nHi[e~[\n]~b]ai\n<think>\n"
    assert render(messages, add_generation_prompt=True) == expected


def test_system_turn_is_always_there() -> None:
    assert render([USER]) == ASK
    assert render([USER], model_identity="You are E.") == ASK.replace("You are a helpful assistant.", "You are E.")
    assert render([{"role": "developer", "content": "D"}, USER]).startswith("]~!b[]~b]system\nD[e~[\n")


def test_reasoning_is_kept_only_after_the_last_user_message() -> None:
    """An old thought is forgotten with the next question; one across tool calls goes on."""
    answer = {"role": "assistant", "reasoning_content": "r", "content": "c"}
    assert render([USER, answer]) == ASK + "]~b]ai\n<think>\nr\n</think>\n\nc[e~[\n"
    assert render([USER, answer, USER]) == ASK + "]~b]ai\nc[e~[\n]~b]user\nHi[e~[\n"


def test_thoughts_written_in_the_content_are_told_apart() -> None:
    answer = {"role": "assistant", "content": "<think>\nr\n</think>\n\nc"}
    assert render([USER, answer]) == ASK + "]~b]ai\n<think>\nr\n</think>\n\nc[e~[\n"
    assert render([USER, answer, USER]) == ASK + "]~b]ai\nc[e~[\n]~b]user\nHi[e~[\n"


@pytest.mark.parametrize("content", [None, "", []])
def test_null_content_is_empty(content: object) -> None:
    """Not the word None, as with the first published templates."""
    assert render([USER, {"role": "assistant", "content": content}]) == ASK + "]~b]ai\n[e~[\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert render([{"role": "user", "content": parts}]) == ASK


def test_tool_calls_and_their_results() -> None:
    """Values that are not strings are JSON; consecutive results share one turn; a part ends its line."""
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": [{"type": "text", "text": "warm"}]},
    ]
    assert render(messages) == (
        ASK + "]~b]ai\n<think>\nr\n</think>\n\n\n<minimax:tool_call>\n"
        '<invoke name="f">\n<parameter name="city">Köln</parameter>\n<parameter name="days">2</parameter>\n'
        '<parameter name="deep">{"a": null}</parameter>\n</invoke>\n</minimax:tool_call>[e~[\n'
        "]~b]tool\n<response>sunny</response>\n<response>warm\n</response>[e~[\n"
    )


def test_tools_are_listed_in_the_system_turn() -> None:
    function = {"name": "f", "description": "<Ä> & b", "parameters": {"type": "object", "properties": {}}}
    text = render([USER], tools=[{"type": "function", "function": function}] * 2)
    system = text.split("[e~[\n")[0]
    assert system.startswith("]~!b[]~b]system\nYou are a helpful assistant.\n\n# Tools\n")
    line = f"<tool>{json.dumps(function, ensure_ascii=False)}</tool>\n"
    assert f"<tools>\n{line}{line}</tools>\n" in system
    assert '<minimax:tool_call>\n<invoke name="' in system


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {"role": "system", "content": "s"}], "a system message must be the first"),
        ([{"role": "critic", "content": "s"}], "unknown role critic; accepted: system, developer, user"),
        ([USER, {"role": "tool", "content": "s"}], "a tool message must follow an assistant message"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], 'content parts must be of type "text"'),
        ([{"role": "user", "content": 3}], "content must be a string, a list of text parts or null"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "tool call arguments must be an object",
        ),
    ],
)
def test_what_has_no_place_in_the_format_is_refused(messages: list[dict[str, Any]], message: str) -> None:
    """Rather than dropped in silence."""
    with pytest.raises(TemplateError, match=message):
        render(messages)

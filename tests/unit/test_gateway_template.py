"""Messages become the prompt the checkpoint's template writes; what templates trip over is mended first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import BadRequest, CheckpointUnreadable
from gateway.template import ChatTemplate, load_template, normalise
from tests.unit.gateway_world import TEMPLATE, write_checkpoint

USER = {"role": "user", "content": "Hi"}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_the_prompt_is_what_the_template_says() -> None:
    """Blocks leave no blank lines, as the family's templates assume."""
    text = ChatTemplate(TEMPLATE, {}).render(normalise([{"role": "system", "content": "S"}, USER]))
    assert text == "]~!b[]~b]system\nS[e~[\n]~b]user\nHi[e~[\n]~b]ai"


def test_tojson_escapes_neither_html_nor_umlauts() -> None:
    """jinja2's own filter would, and knows no ensure_ascii."""
    messages = normalise([USER, {"role": "assistant", "content": None, "tool_calls": [call('{"a": "<ü>"}')]}])
    assert '<f {"a": "<ü>"}>' in ChatTemplate(TEMPLATE, {}).render(messages)


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_become_an_object(arguments: Any) -> None:
    (_, message) = normalise([USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}])
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_all_system_and_developer_messages_become_the_first() -> None:
    """Templates would silently drop every one but the first."""
    messages = [USER, {"role": "system", "content": "A"}, USER, {"role": "developer", "content": "B"}]
    assert normalise(messages) == [{"role": "system", "content": "A\n\nB"}, USER, USER]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert normalise([{"role": "user", "content": parts}])[0]["content"] == "a\nb"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "reasoning_details"])
def test_reasoning_comes_back_by_any_of_its_names(field: str) -> None:
    """Interleaved thinking: what the model thought must be in its next prompt."""
    thought: Any = [{"type": "reasoning.text", "text": "hm"}] if field == "reasoning_details" else "hm"
    (_, message) = normalise([USER, {"role": "assistant", "content": "x", field: thought}])
    assert message["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([USER, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 4}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [call("{")]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("[1]")]}], "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_what_cannot_be_is_refused_by_place(messages: list[Any], param: str) -> None:
    with pytest.raises(BadRequest, match="accepted: ") as caught:
        normalise(messages)
    assert caught.value.param == param


@pytest.mark.parametrize("arguments", ["[" * 9999, '{"a": "\\ud800"}', '{"a": NaN}', {"a": float("inf")}])
def test_arguments_that_no_prompt_can_hold_are_refused(arguments: Any) -> None:
    """Nested without end, half a surrogate pair, no JSON number."""
    with pytest.raises(BadRequest, match=r"arguments is .*accepted: a JSON object"):
        normalise([{"role": "assistant", "tool_calls": [call(arguments)]}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no tool before a call') }}",
        "{{ messages[7].role }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 // 0 }}",
    ],
)
def test_whatever_a_template_does_the_client_hears_of_its_messages(source: str) -> None:
    """Its own refusals, its mistakes, and what the sandbox forbids."""
    with pytest.raises(BadRequest, match="chat template cannot render") as caught:
        ChatTemplate(source, {}).render([USER])
    assert caught.value.param == "messages"


def test_the_template_is_found_in_either_file(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    config = {
        "chat_template": [{"name": "default", "template": "{{ bos_token }}!"}],
        "bos_token": {"content": "B"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([]) == "B!"
    write_checkpoint(tmp_path)
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([]).startswith("]~!b[")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointUnreadable, match="chat template"):
        load_template(tmp_path)


def test_results_come_in_the_order_of_their_calls() -> None:
    """Templates tell them apart by it alone. Where ids say nothing they stay as they are."""

    def conversation(ids: list[Any], results: list[Any]) -> list[dict[str, Any]]:
        calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ids]
        tools = [{"role": "tool", "tool_call_id": i, "content": str(i)} for i in results]
        user = {"role": "user", "content": "x"}
        return [user, {"role": "assistant", "content": None, "tool_calls": calls}, *tools, user]

    def order(ids: list[Any], results: list[Any]) -> list[str]:
        return [one["content"] for one in normalise(conversation(ids, results)) if one["role"] == "tool"]

    assert order(["a", "b", "c"], ["c", "a", "b"]) == ["a", "b", "c"]
    assert order(["a", "b"], ["b", "x"]) == ["b", "x"]
    assert order([None, None], ["b", "a"]) == ["b", "a"]

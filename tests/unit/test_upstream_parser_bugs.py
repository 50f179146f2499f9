"""Every defect that other servers of this family are known to have had in reading answers, by its number there.

An issue and the changes that mended it are one test.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.parsers.arguments import as_json, kinds_of_parameters
from gateway.parsers.calls import Kinds, Parsed
from gateway.parsers.minimax_m2 import AnswerParser
from gateway.request import FinishReason
from gateway.template import ChatTemplate, normalise
from tests.unit.answers import PROMPT, TAGS, TEMPLATE, TOKENS, USER, calls, read

TOOLS: dict[str, Kinds] = {
    "f": kinds_of_parameters(
        {
            "properties": {
                "text": {"type": "string"},
                "maybe": {"type": ["string", "null"]},
                "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "mode": {"enum": ["none", "auto"]},
                "ratio": {"type": "number"},
                "deep": {"type": "object"},
            }
        }
    )
}


def block(*parameters: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in parameters)
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{inner}</invoke>\n</minimax:tool_call>'


def said(
    text: str, cuts: list[int] | None = None, **options: Any
) -> tuple[str, str, list[tuple[str | None, str]]]:
    out, _ = read(TOKENS.encode(text), options.pop("tools", TOOLS), cuts or [], **options)
    return out.reasoning, out.content, calls(out)


def arguments(*parameters: tuple[str, str]) -> Any:
    ((_, found),) = said(block(*parameters))[2]
    return json.loads(found)


def streamed(text: str) -> list[Parsed]:
    """All that was said by each token of it, come one by one, the end not told."""
    ids = TOKENS.encode(text)
    ends = range(1, len(ids) + 1)
    return [read(ids[:end], TOOLS, [*range(1, end)], finish=FinishReason.LENGTH)[0] for end in ends]


# --- vLLM ------------------------------------------------------------------------------------


def test_vllm_29882_reasoning_is_apart_in_a_stream_too() -> None:
    parts = streamed("I think.\n</think>\n\nHi")
    assert not any(part.content for part in parts if len(part.reasoning) < len("I think."))
    assert (parts[-1].reasoning, parts[-1].content) == ("I think.", "Hi")


def test_vllm_30554_30555_no_cut_is_out_of_range() -> None:
    """Also where nothing has come yet, or nothing but a tag."""
    text = "<minimax:tool_call>" + '<invoke name="f"></invoke></minimax:tool_call>'
    for end in range(len(ids := TOKENS.encode(text)) + 1):
        read(ids[:end], TOOLS, [*range(1, end)])
        read(ids[:end], TOOLS, [*range(1, end)], finish=FinishReason.LENGTH)


def test_vllm_31083_any_of_and_enum_have_kinds() -> None:
    assert arguments(("count", "3"), ("mode", "auto")) == {"count": 3, "mode": "auto"}


@pytest.mark.parametrize("text", ["a/b", "None", "nil", ""])
def test_vllm_32278_32342_an_optional_parameter_is_not_null_unless_it_says_so(text: str) -> None:
    assert arguments(("maybe", text)) == {"maybe": text}


def test_vllm_35349_35352_the_prompts_last_think_token_counts() -> None:
    """After a tool's result an earlier turn's thought is closed, and the next one open."""
    called = {"role": "assistant", "content": "", "reasoning": "t", "tool_calls": [{"function": {"name": "f"}}]}
    prompt = TOKENS.encode(TEMPLATE.render(normalise([USER, called, {"role": "tool", "content": "r"}])))
    assert prompt.count(TAGS.think) == 2
    assert prompt.count(TAGS.think_end) == 1
    assert TAGS.leave_thought_open(prompt)
    assert not TAGS.leave_thought_open([*prompt, TAGS.think_end])


@pytest.mark.parametrize("stride", [2, 3, 7, 10_000])
def test_vllm_35895_deltas_of_several_tokens_lose_no_arguments(stride: int) -> None:
    text = "t</think>" + block(("text", "abc"), ("count", "12"))
    cuts = [*range(stride, len(TOKENS.encode(text)), stride)]
    assert said(text, cuts)[2] == [("f", '{"text": "abc", "count": 12}')]


def test_vllm_36073_36116_39649_40779_arguments_come_as_they_are_generated() -> None:
    """Within a long string, not at `</invoke>`: what waits is shorter than what could end it."""
    begin, value = block(("text", "")).partition("</parameter>")[0], "x = {'a': 1} < 2\n" * 8
    for part in streamed(begin + value)[len(TOKENS.encode(begin)) :]:
        ((_, found),) = calls(part)
        assert ('{"text": ' + json.dumps(value)).startswith(found)
    assert len(json.loads(found + '"}')["text"]) > len(value) - len("\n<parameter name=")


def test_vllm_39567_39599_none_in_an_enum_is_a_string() -> None:
    assert arguments(("mode", "none")) == {"mode": "none"}


@pytest.mark.parametrize("tools", [{}, {"f": {}}, TOOLS])
@pytest.mark.parametrize("calls_max", [None, 1])
def test_vllm_39683_39861_a_parser_can_be_made_for_any_request(tools: dict[str, Kinds], calls_max: int) -> None:
    parser, out = AnswerParser(TAGS, tools, in_thought=True, calls_max=calls_max), Parsed()
    parser.end(out, is_cut=False)
    assert out == Parsed()


@pytest.mark.parametrize("quote", ['"', "'", ""])
def test_vllm_45701_quotes_of_every_style(quote: str) -> None:
    """The rewrite that took in 40253, 40298, 40975, 44107, 38213, 44898, 42307 and 37790."""
    name, key = f"{quote}f{quote}", f"{quote}text{quote}"
    invoke = f"<invoke name={name}>\n<parameter name={key}> v </parameter>\n</invoke>"
    assert said(f"<minimax:tool_call>\n{invoke}\n</minimax:tool_call>")[2] == [("f", '{"text": " v "}')]


def test_vllm_45701_values_are_verbatim_and_may_lack_their_end() -> None:
    left_open = '<invoke name="f">\n<parameter name="text">\n a \n<parameter name="count">1</parameter>\n</invoke>'
    assert said(f"<minimax:tool_call>{left_open}</minimax:tool_call>")[2] == [
        ("f", '{"text": "\\n a ", "count": 1}')
    ]


def test_vllm_45701_unknown_tools_are_no_calls() -> None:
    assert said("</think>" + block(("text", "x"), name="rm"))[2] == []


def test_vllm_ascend_10758_a_split_end_of_a_parameter_does_not_leak() -> None:
    text = block(("text", "abc"))
    for part in streamed(text):
        for _, found in calls(part):
            assert "<" not in found


def test_vllm_ascend_10376_a_stream_survives_what_is_no_call() -> None:
    for broken in (
        "<invoke",
        "<invoke name=>",
        '<parameter name="text">',
        "</invoke></invoke>",
        "<invoke name='f\">",
    ):
        streamed("<minimax:tool_call>" + broken + "</minimax:tool_call>x")


def test_vllm_37955_45802_reasoning_tokens_are_those_of_thoughts() -> None:
    thought, rest = TOKENS.encode("I think."), TOKENS.encode("Hi")
    for cuts in ([], [3], [*range(1, 12)]):
        ids = [*thought, TAGS.think_end, *rest]
        _, parser = read(ids, TOOLS, [cut for cut in cuts if cut < len(ids)])
        assert parser.num_reasoning_tokens(len(ids)) == len(thought)


def test_vllm_46042_45687_and_dynamo_11554_a_thought_is_in_neither_content_nor_call() -> None:
    """Nor where the call is forced, so that the thought has no end of its own."""
    for end in ("\n</think>\n\n", ""):
        assert said("secret" + end + block(("text", "x"))) == ("secret", "", [("f", '{"text": "x"}')])


# --- SGLang ----------------------------------------------------------------------------------


def test_sglang_16057_17578_20498_nullable_parameters_keep_their_values() -> None:
    for schema in ({"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}):
        kinds = kinds_of_parameters({"properties": {"x": schema}})["x"]
        assert [json.loads(as_json(text, kinds)) for text in ("a/b", "none", "null")] == ["a/b", "none", None]


@pytest.mark.parametrize("text", ["none", "null"])
def test_sglang_a_string_that_says_null_is_a_string(text: str) -> None:
    assert arguments(("text", text)) == {"text": text}


@pytest.mark.parametrize("text", ["inf", "-Infinity", "nan", "1e999"])
def test_sglang_an_infinite_number_is_no_crash_and_no_json_number(text: str) -> None:
    assert arguments(("ratio", text)) == {"ratio": text}


def test_sglang_parameters_keep_their_order() -> None:
    names = [f"k{number}" for number in range(20)]
    assert list(arguments(*((name, "v") for name in names))) == names


def test_sglang_an_invoke_without_parameters_has_an_empty_object() -> None:
    for cuts in ([], [*range(1, len(TOKENS.encode(block())))]):
        assert said(block(), cuts)[2] == [("f", "{}")]


@pytest.mark.parametrize("text", ["}", "{", '"}', '{"a": "}}}', "{{{"])
def test_sglang_braces_within_values_close_nothing(text: str) -> None:
    assert arguments(("text", text), ("maybe", text)) == {"text": text, "maybe": text}
    assert arguments(("deep", json.dumps({"a": text}))) == {"deep": {"a": text}}


def test_sglang_an_unknown_function_takes_no_call_beside_it_along() -> None:
    """What it is stays readable as content; the calls around it are calls."""
    strange = '<invoke name="rm"><parameter name="text">x</parameter></invoke>'
    text = "</think>" + block(("text", "x")).replace("</minimax:tool_call>", strange + "</minimax:tool_call>")
    reasoning, content, made = said(text)
    assert (reasoning, content.strip(), made) == ("", strange, [("f", '{"text": "x"}')])


def test_sglang_23071_24995_a_name_comes_once_and_arguments_come_once() -> None:
    ids = TOKENS.encode(block(("text", "abc"), ("count", "1")) + block(("maybe", "d")))
    out, _ = read(ids, TOOLS, [*range(1, len(ids))])
    for index in (0, 1):
        names = [call.name for call in out.calls if call.index == index]
        assert (names[0], set(names[1:])) == ("f", {None} if len(names) > 1 else set())
    assert [found for _, found in calls(out)] == ['{"text": "abc", "count": 1}', '{"maybe": "d"}']


def test_sglang_22637_vllm_34625_reasoning_is_never_left_within_content() -> None:
    """As `append_think` leaves it there."""
    assert said("t\n</think>\n\nHi") == ("t", "Hi", [])


# --- others ----------------------------------------------------------------------------------


def test_dynamo_108_a_call_ends_a_thought() -> None:
    """It may come without `</think>`."""
    assert said("t\n" + block(("text", "x"))) == ("t", "", [("f", '{"text": "x"}')])


def test_m2_14_the_tags_of_another_template_are_text() -> None:
    text = '<tool_calls>\n{"name": "f", "arguments": {}}\n</tool_calls>'
    assert said("</think>" + text) == ("", text, [])


def test_m2_5_10_no_tag_of_a_call_is_left_in_the_text() -> None:
    reasoning, content, made = said("t</think>\n\nLook.\n" + block(("text", "x")) + "\n")
    assert (reasoning, content, len(made)) == ("t", "Look.", 1)


def test_llama_cpp_21610_a_prompt_opens_the_thought_that_the_answer_goes_on_with() -> None:
    assert PROMPT.endswith("<think>\n")
    assert TAGS.leave_thought_open(TOKENS.encode(PROMPT))


RELEASED = """\
{% for m in messages %}{{ m.role }}:{{ m.content }}
{% for c in m.tool_calls or [] %}
{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}
{% if m.role == 'system' and loop.index0 > 0 %}DROPPED{% endif %}{% endfor %}"""
"""What released templates trip over: they print a null as None, take arguments for an object, and only the first
system message."""


def test_minja_7_and_the_released_templates_read_openais_shapes() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "system", "content": "late"},
        {"role": "developer", "content": "later"},
    ]
    text = ChatTemplate(RELEASED, {}).render(normalise(messages))
    assert "None" not in text
    assert "DROPPED" not in text
    assert "a=b" in text
    assert text.startswith("system:late\n\nlater\n")

"""Thought, content and tool calls are told apart, whole or streamed, however the tokens come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.parsers.arguments import kinds_of_parameters
from gateway.parsers.calls import Kinds
from gateway.request import FinishReason
from tests.unit.answers import TAGS, TOKENS, calls, read, written

SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "maybe": {"type": ["string", "null"]},
        "deep": {"type": "object"},
        "list": {"type": "array"},
        "flag": {"type": "boolean"},
    }
}
TOOLS: dict[str, Kinds] = {"f": kinds_of_parameters(SCHEMA), "get-it.now": {}}
FEW = settings(max_examples=15)  # each is read once for every cut

STRUCTURAL = (
    "</parameter>",
    "<parameter name=",
    "<invoke",
    "</invoke>",
    "<think>",
    "</think>",
    "minimax:tool_call>",
)
TEXT = st.text(alphabet="ab<>/\n \"'{}\\é🙂", max_size=12).filter(lambda t: not any(s in t for s in STRUCTURAL))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=3,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT,
        "count": st.integers(),
        "maybe": st.none() | TEXT.filter(lambda t: t.strip().lower() != "null"),
        "deep": st.dictionaries(st.sampled_from("ab"), JSON, max_size=2),
        "list": st.lists(JSON, max_size=2),
        "flag": st.booleans(),
        "unknown": TEXT,
    },
)
CALL = st.tuples(st.just("f"), ARGUMENTS) | st.tuples(
    st.just("get-it.now"), st.dictionaries(st.sampled_from(["text", "count", "é"]), TEXT, max_size=2)
)


def message_of(reasoning: str, content: str, made: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if made:
        message["tool_calls"] = [{"function": {"name": name, "arguments": args}} for name, args in made]
    return message


@FEW
@given(TEXT.filter(bool), TEXT, st.lists(CALL, max_size=3))
def test_every_cut_says_what_the_whole_says(
    reasoning: str, content: str, made: list[tuple[str, dict[str, Any]]]
) -> None:
    """And the whole says what was written; sent back it becomes the prompt it was generated as."""
    made = [
        (name, args if name == "f" else {k: v for k, v in args.items() if type(v) is str}) for name, args in made
    ]
    message = message_of(reasoning, content, made)
    ids = TOKENS.encode(written(message))
    whole, parser = read(ids, TOOLS)
    assert (whole.reasoning, whole.content) == (reasoning, content)
    assert [(name, json.loads(arguments)) for name, arguments in calls(whole)] == made
    assert parser.num_calls == len(made)
    again = message_of(whole.reasoning, whole.content, made)
    assert TOKENS.encode(written(again)) == ids
    for cuts in [[cut] for cut in range(1, len(ids) + 1)] + [list(range(1, len(ids) + 1))]:
        parts, cut_parser = read(ids, TOOLS, cuts)
        assert (parts.reasoning, parts.content, calls(parts)) == (whole.reasoning, whole.content, calls(whole))
        assert cut_parser.num_reasoning_tokens(len(ids)) == parser.num_reasoning_tokens(len(ids))


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
            *(
                '<invoke name="f">',
                "<invoke name='f'>",
                "<invoke name=f>",
                '<invoke name="g">',
                "</invoke>",
                "<invoke",
            ),
            *('<parameter name="text">', "<parameter name=count>", '<parameter name="deep">', "</parameter>"),
            *("\n", "x", "<", '{"a": [1]}', "7", " ", "</param", '"', "🙂"),
        ]
    ),
    max_size=25,
)


@FEW
@given(FRAGMENTS, st.booleans(), st.sampled_from(FinishReason), st.sampled_from([(), ("name=",), (">\n",)]))
def test_no_output_however_wrong_depends_on_its_cuts(
    fragments: list[str], in_thought: bool, finish: FinishReason, stop: tuple[str, ...]
) -> None:
    """Nor raises; and a call that is complete has an object for arguments."""
    ids = TOKENS.encode("".join(fragments))
    options: dict[str, Any] = {"finish": finish, "stop": stop, "in_thought": in_thought}
    whole, parser = read(ids, TOOLS, **options)
    for cuts in [[cut] for cut in range(1, len(ids))] + [list(range(1, len(ids)))]:
        if ids:
            parts, _ = read(ids, TOOLS, cuts, **options)
            assert (parts.reasoning, parts.content, calls(parts)) == (whole.reasoning, whole.content, calls(whole))
    for _, arguments in calls(whole)[: parser.num_calls]:
        assert isinstance(json.loads(arguments), dict)
    if finish is FinishReason.STOP and not stop:
        assert parser.num_calls == len(calls(whole))


def said(text: str, **options: Any) -> tuple[str, str, list[tuple[str | None, str]]]:
    out, _ = read(TOKENS.encode(text), options.pop("tools", TOOLS), **options)
    return out.reasoning, out.content, calls(out)


def block(*invokes: str) -> str:
    return "<minimax:tool_call>\n" + "\n".join(invokes) + "\n</minimax:tool_call>"


def invoke(*parameters: str, name: str = "f") -> str:
    return f'<invoke name="{name}">\n' + "".join(f"{p}\n" for p in parameters) + "</invoke>"


def test_a_thought_is_open_by_the_last_think_token_of_the_prompt() -> None:
    """Not by any: an earlier turn may have closed one (vLLM #35352)."""
    think, end = TAGS.think, TAGS.think_end
    for prompt, is_open in (
        ([], False),
        ([think], True),
        ([think, 5, end, 6], False),
        ([think, end, think, 5], True),
    ):
        assert TAGS.leave_thought_open(prompt) is is_open
    assert said("a</think>\n\nb", in_thought=True) == ("a", "b", [])
    assert said("plain", in_thought=False) == ("", "plain", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n</think>\n\nb\n", ("a", "b\n", [])),
        ("a\n\n</think>\n\n\n\nb", ("a\n", "\n\nb", [])),
        ("never closed\n", ("never closed\n", "", [])),
        ("<think>\na</think>b", ("a", "b", [])),
        ("a</think>\n\n<think>\nb</think>c", ("ab", "c", [])),
        ("a</think>say <think> and </think>.", ("a", "say <think> and </think>.", [])),
        ("a <think> b</think>c", ("a <think> b", "c", [])),
    ],
)
def test_thoughts_end_where_their_tag_does(text: str, expected: Any) -> None:
    """The template's line breaks are layout; a tag without a meaning is text."""
    assert said(text) == expected


def test_a_tag_spelled_with_other_tokens_is_text() -> None:
    ids = [token for char in "a</think>b" for token in TOKENS.encode(char)]
    out, _ = read(ids, TOOLS)
    assert (out.reasoning, out.content) == ("a</think>b", "")


def test_a_tool_call_ends_a_thought() -> None:
    """Without </think>; and where no tools were offered, what follows is content."""
    text = "I call\n" + block(invoke())
    assert said(text) == ("I call", "", [("f", "{}")])
    assert said(text, tools={}) == ("I call", block(invoke()), [])


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        (invoke(), "{}"),
        (invoke('<parameter name="text"> a\n</parameter>'), '{"text": " a\\n"}'),
        (invoke("<parameter name='count'>7</parameter>", "<parameter name=flag>true</parameter>"), None),
        (invoke('<parameter name="maybe">a/b</parameter>'), '{"maybe": "a/b"}'),
        (invoke('<parameter name="maybe">null</parameter>'), '{"maybe": null}'),
        (invoke('<parameter name="maybe">none</parameter>'), '{"maybe": "none"}'),
        (invoke('<parameter name="text">null</parameter>'), '{"text": "null"}'),
        (invoke('<parameter name="text">}{"}</parameter>'), '{"text": "}{\\"}"}'),
        (invoke('<parameter name="deep">{"a": "</b>"}</parameter>'), '{"deep": {"a": "</b>"}}'),
        (invoke('<parameter name="count">many</parameter>'), '{"count": "many"}'),
        (invoke('<parameter name="text">a', '<parameter name="count">1</parameter>'), '{"text": "a", "count": 1}'),
        (invoke('<parameter name="text">a\n'), '{"text": "a\\n"}'),
        (invoke('<parameter name="text">a</parameter>', '<parameter name="text">b</parameter>'), '{"text": "a"}'),
        (invoke("noise < noise", '<parameter name="text">a</parameter>'), '{"text": "a"}'),
        (invoke('<parameter name="text">a </param</parameter>'), '{"text": "a </param"}'),
        ('<invoke name="f"><parameter name="text">cut by the end of the block\n', None),
    ],
)
def test_parameters_become_json(body: str, arguments: str | None) -> None:
    """Values verbatim, of their schema's kind; what is left open ends with what it stands in."""
    reasoning, content, made = said(block(body))
    assert (reasoning, content) == ("", "")
    ((name, found),) = made
    assert name == "f"
    assert isinstance(json.loads(found), dict)
    assert arguments is None or found == arguments


def test_several_calls_and_text_around_them() -> None:
    text = "t</think>\n\nFirst.\n" + block(invoke(), invoke(name="get-it.now")) + "\n" + block(invoke()) + "\n"
    assert said(text) == ("t", "First.", [("f", "{}"), ("get-it.now", "{}"), ("f", "{}")])
    assert said(text, calls_max=1)[2] == [("f", "{}")]
    assert said(text + "Last.")[1] == "First.Last."


def test_a_tool_that_was_not_offered_is_content() -> None:
    """So is anything else in a block that is no call: nothing is lost, nothing is invented."""
    stranger = invoke('<parameter name="text">x</parameter>', name="rm")
    assert said("</think>" + block(stranger)) == ("", f"\n{stranger}\n", [])
    assert said("</think>" + block(invoke(), stranger)) == ("", f"\n{stranger}\n", [("f", "{}")])
    assert said("</think>" + block('{"name": "f"}'))[1] == '\n{"name": "f"}\n'
    assert said("</think><minimax:tool_call><invoke name=>" + "x" * 600)[1] == "<invoke name=>" + "x" * 600
    assert said("</think><minimax:tool_call><invoke " + "x" * 600)[1] == "<invoke " + "x" * 600


def test_arguments_come_while_they_are_generated() -> None:
    """A string's characters at once, except what could still be a tag (vLLM #39649)."""
    start = "<minimax:tool_call>\n" + '<invoke name="f">\n<parameter name="text">'
    for more, arguments in (("", '{"text": "'), ("abc", '{"text": "abc'), ('a"</para', '{"text": "a\\"')):
        assert said(start + more, finish=FinishReason.LENGTH)[2] == [("f", arguments)]
    assert said(start + "abc")[2] == [("f", '{"text": "abc"}')]  # the model ended it: so does the call
    assert said(start + "abc", stop=("bc",))[2] == [("f", '{"text": "a')]


def test_reasoning_tokens_are_counted_without_tags_and_eos() -> None:
    think = [TOKENS.encode(char)[0] for char in "abc"]
    answer = [*think, TAGS.think_end, *think, TAGS.think, *think]
    _, parser = read(answer, TOOLS)
    assert parser.num_reasoning_tokens(len(answer)) == 3
    _, parser = read([*think, TAGS.think_end, TAGS.think, *think, TAGS.calls], TOOLS)
    assert parser.num_reasoning_tokens(99) == 6
    _, parser = read(think, TOOLS)
    assert parser.num_reasoning_tokens(3) == 3


def test_a_long_answer_is_read_in_linear_time() -> None:
    """100,000 characters that all could begin something, in one piece."""
    text = "<minimax:tool_call>" + '<invoke name="f">' + "<" * 100_000
    assert said(text)[2] == [("f", "{}")]

"""Random answers of the family with what they mean, as this file has it: for tests of the parser.

An answer is written as the model writes it, in all the ways that it is known to: any quotes around names, ends of
parameters, invokes and thoughts left out, several blocks, tools that were never offered. What it means is put
together beside it from the same draws, not read from the text.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from gateway.parsers.arguments import kinds_of_parameters
from gateway.parsers.calls import Kinds

BITS = (
    *(
        "a",
        "weather",
        "Zürich",
        "日本",
        "🙂",
        " ",
        "\n",
        "\t",
        "\\",
        '"',
        "'",
        "{",
        "}",
        "[1]",
        "<",
        ">",
        "&lt;",
        "</",
    ),
    *(
        "</param",
        "<parameter",
        "</p>",
        "<invok",
        "<response>",
        "null",
        "-7",
        "1e3",
        "true",
        '{"a": "}"}',
        "\u2028",
    ),
    *("</function>", "<tool_calls>", "é\u0301", "%s", "\r\n", "$(rm)", "```py\nx = {}\n```"),
)
TAGS_AS_TEXT = ("<think>", "</think>", "<minimax:tool_call>")  # within a value
SCHEMAS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ({"type": "string"}, ("string",)),
    ({}, ("string",)),
    ({"type": "integer"}, ("integer",)),
    ({"type": "number"}, ("number", "integer")),
    ({"type": "boolean"}, ("boolean",)),
    ({"type": "object"}, ("object",)),
    ({"type": "array", "items": {}}, ("array",)),
    ({"type": ["string", "null"]}, ("word", "null")),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, ("integer", "word")),
    ({"oneOf": [{"type": "array"}, {"type": "null"}]}, ("array", "null")),
    ({"allOf": [{"description": "x"}, {"$ref": "#/$defs/flag"}]}, ("boolean",)),
    ({"type": "integer", "nullable": True}, ("integer", "null")),
    ({"enum": ["none", "all", 5]}, ("choice",)),
)


@dataclass
class Conversation:
    """`expected`: reasoning, content, calls. None where the answer is broken off: it means what its whole does."""

    tools: dict[str, Kinds]
    text: str
    expected: tuple[str, str, list[tuple[str, dict[str, Any]]]] | None
    in_thought: bool
    stop: tuple[str, ...] = ()
    is_cut: bool = False


@dataclass
class _Draft:
    chance: random.Random
    schemas: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)  # sorts of value, by parameter
    text: str = ""
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def conversation(chance: random.Random) -> Conversation:
    draft = _Draft(chance)
    tools = {name: _tool(draft, name) for name in ("get_weather", "run", "fs.read-file")[: chance.randrange(1, 4)]}
    in_thought = chance.random() < 0.9
    num_blocks = chance.choice((0, 1, 1, 1, 2))
    ends_thought = _think(draft, num_blocks) if in_thought else True
    if ends_thought:
        _say(draft, in_thought)
    for number in range(num_blocks):
        _block(draft, number, has_line_break=ends_thought or number > 0)
    text, whole = draft.text, (draft.reasoning, draft.content, draft.calls)
    if chance.random() < 0.1:
        return Conversation(tools, text[: chance.randrange(len(text) + 1)], None, in_thought, is_cut=True)
    if chance.random() < 0.1 and len(text) > 8:
        at = chance.randrange(len(text) - 4)
        return Conversation(tools, text, None, in_thought, stop=(text[at : at + chance.randrange(1, 5)],))
    return Conversation(tools, text, whole, in_thought)


def _tool(draft: _Draft, name: str) -> Kinds:
    names = draft.chance.sample(["city", "days", "q", "deep-list", "é"], draft.chance.randrange(4))
    drawn = {one: draft.chance.choice(SCHEMAS) for one in names}
    draft.schemas[name] = {one: sorts for one, (_, sorts) in drawn.items()}
    properties = {one: schema for one, (schema, _) in drawn.items()}
    return kinds_of_parameters({"properties": properties, "$defs": {"flag": {"type": "bool"}}})


def _think(draft: _Draft, num_blocks: int) -> bool:
    """Whether the thought ends by its own tag: otherwise a block ends it, or the answer."""
    draft.reasoning = _text(draft.chance, 6)
    if draft.chance.random() < 0.1 and draft.reasoning.strip():
        draft.reasoning += "<think> again"  # nested: text
    draft.text = draft.reasoning
    if num_blocks and draft.chance.random() < 0.3:
        draft.text += "\n" if draft.reasoning.endswith("\n") else draft.chance.choice(("", "\n"))
        return False
    draft.text += "\n</think>\n\n"
    return True


def _say(draft: _Draft, after_thought: bool) -> None:
    draft.content = _text(draft.chance, 5)
    if after_thought and draft.chance.random() < 0.1 and draft.content.strip():
        draft.content += " </think> is text here"
    draft.text += draft.content


def _block(draft: _Draft, number: int, *, has_line_break: bool) -> None:
    """A block of invokes; a stranger among them, and what stands around it, is content as it is written."""
    chance, stray = draft.chance, "\n"
    draft.text += "\n" * has_line_break + "<minimax:tool_call>\n"
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.12:
            stranger = f'<invoke name="rm">\n<parameter name="x">{_text(chance, 3)}</parameter>\n</invoke>\n'
            draft.text += stranger
            stray += stranger
            continue
        draft.content += stray if stray.strip() else ""
        stray = "\n" if _invoke(draft) else ""
    draft.content += stray if stray.strip() else ""
    draft.text += "</minimax:tool_call>"
    if chance.random() < 0.2:
        said = chance.choice(("Done.", "x{}", "🙂 and more"))
        draft.text += chance.choice(("", "\n", "\n\n ")) + said
        draft.content += said


def _invoke(draft: _Draft) -> bool:
    """Whether it has its own end: without, the next one ends it."""
    chance = draft.chance
    name = chance.choice(list(draft.schemas))
    sorts, arguments, is_closed = draft.schemas[name], dict[str, Any](), True
    draft.text += f"<invoke name={_quoted(chance, name)}>\n"
    for parameter in chance.sample([*sorts, "more"], chance.randrange(len(sorts) + 2)):
        text, arguments[parameter] = _value(chance, chance.choice(sorts.get(parameter, ("string",))))
        is_closed = chance.random() < 0.85 or text.endswith("\n")
        draft.text += f"<parameter name={_quoted(chance, parameter)}>{text}{'</parameter>' if is_closed else ''}\n"
        if not is_closed and chance.random() < 0.3:
            break
    draft.calls.append((name, arguments))
    ends = chance.random() < 0.9 or not is_closed  # one that is left out closes nothing
    draft.text += "</invoke>\n" if ends else ""
    return ends


def _value(chance: random.Random, sort: str) -> tuple[str, Any]:
    """As text and as what it means."""
    if sort in ("string", "word"):
        text = _text(chance, 60 if chance.random() < 0.03 else 6, *TAGS_AS_TEXT)
        text = "v" + text if sort == "word" else text  # so that it can be of no other kind
        return text, text
    value: Any = {
        "integer": chance.randrange(-10_000, 10**18),
        "number": chance.choice((0.5, -1.25e-7, 3, 6.02e23)),
        "boolean": chance.random() < 0.5,
        "null": None,
        "object": {"a": [1, None, "</x>"], _text(chance, 2): {"b": False}},
        "array": [{}, _text(chance, 3), 1.5],
        "choice": chance.choice(("none", "all", 5)),
    }[sort]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=chance.random() < 0.5)
    return text, value


def _text(chance: random.Random, bits_max: int, *more: str) -> str:
    return "".join(chance.choice(BITS + more) for _ in range(chance.randrange(bits_max + 1)))


def _quoted(chance: random.Random, name: str) -> str:
    quote = chance.choice(('"', '"', "'", ""))
    return f"{quote}{name}{quote}"

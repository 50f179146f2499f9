"""Calls of tools as a grammar: the block that the family writes, for clients that want a call and nothing else.

    <minimax:tool_call> (invoke of a tool, its parameters in the schema's order, optional ones or not)… </…>

A parameter that may be a string is written verbatim and may not hold what ends it; lengths, patterns and enums of
such hold. Any other is JSON of its schema. Parameters that a schema does not name are not written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gateway.errors import invalid
from gateway.grammar import Part, literal, regex, with_options
from gateway.parsers.arguments import STRING
from gateway.parsers.tags import Tags
from gateway.tools import Tool

_ENDS = r"~/(?s:.*)(<\/parameter>|<parameter name=|<\/invoke>)(?s:.*)/"
_DEFINITIONS = ("$defs", "definitions")


def calls_part(tools: Sequence[Tool], tags: Tags, *, one: bool, param: str) -> Part:
    """`one`: a single call; else one or more. Raises BadRequest for a parameter that no tag can name."""
    line, invokes = literal("\n"), "invoke" if one else "invoke+"
    rules = [
        f"start: {line} <[{tags.calls}]> {line} {invokes} <[{tags.calls_end}]>",
        "invoke: " + " | ".join(f"tool{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        rules += _tool(f"tool{number}", tool)
    return Part(param, {"lark_grammar": "\n".join(rules)})


def _tool(rule: str, tool: Tool) -> list[str]:
    parameters = tool.function.get("parameters") or {}
    properties = parameters.get("properties")
    required = parameters.get("required")
    names = properties if isinstance(properties, dict) else {}
    needed = set(filter(lambda name: isinstance(name, str), required)) if isinstance(required, list) else set()
    rules, sequence = [], [literal(f'<invoke name="{tool.name}">\n')]
    for number, (name, schema) in enumerate(names.items()):
        one = f"{rule}_{number}"
        sequence.append(one if name in needed else f"{one}?")
        opening = literal(f"<parameter name={_quoted(name, tool)}>")
        rules.append(f"{one}: {opening} {one}_value {literal('</parameter>' + chr(10))}")
        rules += _value(f"{one}_value", schema, tool, parameters, name)
    return [f"{rule}: {' '.join(sequence)} {literal('</invoke>' + chr(10))}", *rules]


def _quoted(name: str, tool: Tool) -> str:
    for quote in ('"', "'"):
        if name and not set(name) & set(f"{quote}<>"):
            return f"{quote}{name}{quote}"
    raise invalid(
        f"tools.{tool.name}.parameters.properties", name, "names without angle brackets, or both quotes, not empty"
    )


def _value(rule: str, schema: Any, tool: Tool, root: dict[str, Any], name: str) -> list[str]:
    kinds = tool.kinds.get(name, STRING)
    if "string" not in kinds:
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        json_schema = with_options(schema, f"tools.{tool.name}.parameters.properties.{name}")
        return [f"{rule}: %json {json.dumps({**json_schema, **definitions}, ensure_ascii=False)}"]
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list) and listed:
        texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in listed]
        return [f"{rule}: " + " | ".join(map(literal, texts))]
    terminal = rule.upper()
    return [f"{rule}: {terminal}", f"{terminal}: {_text(schema)} & {_ENDS}"]


def _text(schema: dict[str, Any]) -> str:
    """Any text of the schema's length and pattern."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    least = least if type(least) is int and least > 0 else 0
    length = f"{{{least},{most if type(most) is int and most >= least else ''}}}"
    text = f"/(?s:.{length})/" if least or type(most) is int else "/(?s:.*)/"
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return text
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = inner.removesuffix("$") if not after else inner
    return f"{text} & {regex(f'{before}({inner}){after}')}"

"""What an answer must be, as llguidance reads it: from response_format, structured_outputs, guided_* and tools.

JSON is written on one line, `", "` and `": "` between its parts and no other white space: what models write most,
and white space without end is how a constrained answer never ends. Objects have their properties in the schema's
order. What a schema says that cannot be held is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.bodies import GenerateBody, accepted_for
from gateway.errors import BadRequest, invalid, shown

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CHOICES_MAX = 1024

_STRUCTURED = ("json", "json_object", "regex", "choice", "grammar")
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


@dataclass(frozen=True)
class Part:
    """A grammar of its own, and the request's field that it comes from."""

    param: str
    grammar: dict[str, Any]


def wanted(body: GenerateBody) -> Part | None:
    """What the client wants the answer's text to be; None: any. Raises BadRequest."""
    found = [part for part in (_response_format(body), _structured_outputs(body)) if part is not None]
    for field, kind in _GUIDED.items():
        if (value := getattr(body, field)) is not None:
            found.append(Part(field, _grammar(kind, value, field)))
    if len(found) > 1:
        names = " and ".join(part.param.partition(".")[0] for part in found)
        raise BadRequest(f"{names} are both given; accepted: one constraint", param=found[1].param)
    return found[0] if found else None


def whole(parts: Sequence[Part], *, after_thought: bool) -> str:
    """The grammar of an answer that is any one of `parts`. Behind a thought come the template's line breaks."""
    if len(parts) == 1 and not after_thought:
        return json.dumps({"grammars": [parts[0].grammar]}, ensure_ascii=False)
    names = [f"part{number}" for number in range(len(parts))]
    breaks = '"\\n\\n" ' if after_thought else ""
    start = f"start: {breaks}({' | '.join('@' + name for name in names)})"
    named = [{**part.grammar, "name": name} for part, name in zip(parts, names, strict=True)]
    return json.dumps({"grammars": [{"lark_grammar": start}, *named]}, ensure_ascii=False)


def with_options(schema: Any, param: str) -> dict[str, Any]:
    """A JSON Schema as the compiler takes it."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid(param, schema, "a JSON Schema, which is an object")
    return {**schema, "x-guidance": JSON_OPTIONS}


def literal(text: str) -> str:
    """As Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _response_format(body: GenerateBody) -> Part | None:
    given, param = body.response_format, "response_format"
    if given is None:
        return None
    if not isinstance(given, dict):
        raise invalid(param, given, accepted_for(GenerateBody, param))
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Part(param, _grammar("json_object", True, param))
        case "json_schema":
            inside, param = given.get("json_schema"), f"{param}.json_schema"
            if not isinstance(inside, dict) or "schema" not in inside:
                raise invalid(param, inside, "an object with name and schema")
            return Part(f"{param}.schema", _grammar("json", inside["schema"], f"{param}.schema"))
    raise invalid(f"{param}.type", given.get("type"), "text, json_object or json_schema")


def _structured_outputs(body: GenerateBody) -> Part | None:
    given, param = body.structured_outputs, "structured_outputs"
    if given is None:
        return None
    if not isinstance(given, dict):
        raise invalid(param, given, accepted_for(GenerateBody, param))
    set_ones = {key: value for key, value in given.items() if value not in (None, False)}
    for key in set_ones:
        if key not in _STRUCTURED:
            raise BadRequest(
                f"{param}.{key} is {shown(given[key])}, which is not supported here; accepted: one of "
                f"{', '.join(_STRUCTURED)}",
                param=f"{param}.{key}",
                code="unsupported_parameter",
            )
    if len(set_ones) != 1:
        raise invalid(param, given, f"an object with exactly one of {', '.join(_STRUCTURED)}")
    ((kind, value),) = set_ones.items()
    return Part(f"{param}.{kind}", _grammar(kind, value, f"{param}.{kind}"))


def _grammar(kind: str, value: Any, param: str) -> dict[str, Any]:
    if kind == "json_object":
        if value is not True:
            raise invalid(param, value, "true")
        return {"json_schema": with_options({"type": "object"}, param)}
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise invalid(param, value, "a JSON Schema, as an object or as its JSON") from None
        return {"json_schema": with_options(value, param)}
    if kind == "choice":
        is_list = isinstance(value, list) and 1 <= len(value) <= CHOICES_MAX
        if not is_list or not all(isinstance(one, str) for one in value):
            raise invalid(param, value, f"a list of 1 to {CHOICES_MAX} strings")
        return {"lark_grammar": "start: " + " | ".join(map(literal, value))}
    if not isinstance(value, str) or not value.strip():
        raise invalid(param, value, "a string that is not blank")
    if kind == "regex":
        return {"lark_grammar": f"start: {regex(value)}"}
    return {"lark_grammar": value}


def regex(pattern: str) -> str:
    """A regular expression as Lark writes it."""
    escaped, is_escaped = "", False
    for char in pattern:
        escaped += "\\/" if char == "/" and not is_escaped else "\\n" if char == "\n" else char
        is_escaped = char == "\\" and not is_escaped
    return f"/{escaped}/"

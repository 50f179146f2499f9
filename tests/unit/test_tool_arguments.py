"""Values of tool parameters get the kind that the tool's schema allows, and no other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parsers.arguments import as_json, kinds_of_parameters, string_as_json


def value(text: str, schema: Any, **root: Any) -> Any:
    kinds = kinds_of_parameters({"properties": {"x": schema}, **root})
    return json.loads(as_json(text, kinds["x"]))


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": "integer"}, 5),
        (" -5 ", {"type": "integer"}, -5),
        ("5.0", {"type": "integer"}, 5.0),
        ("1_000", {"type": "integer"}, "1_000"),
        ("٣", {"type": "integer"}, "٣"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("5", {"type": "number"}, 5),
        ("5.50", {"type": "number"}, 5.5),
        ("1e3", {"type": "number"}, 1000),
        ("1e300", {"type": "number"}, 1e300),
        ("inf", {"type": "number"}, "inf"),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("0", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ('{"a": [1, null]}', {"type": "object"}, {"a": [1, None]}),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ("[1]", {"type": "object"}, [1]),
        ('["a"]', {"type": "array"}, ["a"]),
        ('{"a": NaN}', {"type": "object"}, '{"a": NaN}'),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ('["\\ud800"]', {"type": "array"}, ["\ud800"]),
        ("a/b", {"type": ["string", "null"]}, "a/b"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": "integer"}, None),
        ("none", {"enum": ["none", "all"]}, "none"),
        ("2", {"enum": [1, 2]}, 2),
        ("auto", {"enum": ["auto", 5]}, "auto"),
        ("5", {"enum": ["auto", 5]}, 5),
        ("null", {"enum": ["a", None]}, None),
        ("3", {"const": 3}, 3),
        ("3", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3),
        ("null", {"oneOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("3", {"allOf": [{"description": "n"}, {"anyOf": [{"type": "number"}]}]}, 3),
        ("null", {"type": "string", "nullable": True}, None),
        ("3", {"type": "int32"}, 3),
        ("[3]", {"type": "list"}, [3]),
        ("3", {"type": "str"}, "3"),
        ("3", {}, "3"),
        ("3", True, "3"),
        ("3", {"type": ["string", "integer"]}, 3),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ('{"a": 1}', {"$ref": "#/$defs/A"}, {"a": 1}),
        ("x", {"$ref": "#/$defs/Self"}, "x"),
        ("x", {"$ref": "https://elsewhere"}, "x"),
    ],
)
def test_the_first_kind_that_fits(text: str, schema: Any, expected: Any) -> None:
    """null, integer, number, boolean, object, array, string; else JSON; else the text itself."""
    definitions = {"A": {"type": "object"}, "Self": {"anyOf": [{"$ref": "#/$defs/Self"}]}}
    assert value(text, schema, **{"$defs": definitions}) == expected


def test_a_reference_is_followed_once_however_often_it_is_named() -> None:
    """Each doubles the next: following all would take 2^30 steps."""
    definitions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    definitions["d30"] = {"type": "integer"}  # type: ignore[dict-item]
    assert value("3", {"$ref": "#/$defs/d0"}, **{"$defs": definitions}) == 3


@given(st.text(max_size=20), st.integers(0, 20))
def test_a_strings_parts_are_its_whole(text: str, cut: int) -> None:
    parts = string_as_json(text[:cut]) + string_as_json(text[cut:])
    assert json.loads(f'"{parts}"') == text


@given(st.text(alphabet='0123456789.eE+-{}[]",:nulltrfasiNIy \\u_', max_size=15), st.sets(st.sampled_from(
    ["null", "integer", "number", "boolean", "object", "array", "string"]
), min_size=1))  # fmt: skip
def test_any_text_of_any_kind_is_json_that_utf8_can_carry(text: str, kinds: set[str]) -> None:
    json.loads(as_json(text, kinds).encode())

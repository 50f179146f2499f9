"""A tool's parameters: what kinds of JSON value a schema allows, and a value's text as JSON of such a kind.

The family writes every value as text and leaves its kind to the tool's schema. Of the kinds that are allowed the
first that the text can be read as is taken: null, integer, number, boolean, object, array, string. null needs the
schema's leave, so that a string "null" or "none" stays one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

STRING = frozenset({"string"})
DEPTH_MAX = 64  # of a parameter's schema

_NAMES = {
    "null": ("null", "none", "nonetype"),
    "integer": ("integer", "int", "int32", "int64", "long", "short", "uint", "uint32", "uint64"),
    "number": ("number", "float", "float32", "float64", "double", "decimal"),
    "boolean": ("boolean", "bool"),
    "object": ("object", "dict", "dictionary", "map", "mapping"),
    "array": ("array", "list", "tuple", "set", "sequence"),
}
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names}
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")  # not what Python reads too: 1_000, other scripts' digits, inf
_DECIMAL = re.compile(r"\s*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
_EXACT_INTEGERS = 2.0**53  # below it a float64 that is integral is that integer


def kinds_of_parameters(schema: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Of each property of a tool's `parameters`. A property that says nothing of its kind is a string.

    Raises ValueError where alternatives and references are nested deeper than DEPTH_MAX.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    of_references: dict[str, frozenset[str]] = {}  # each is followed once, however often it is named
    return {name: _kinds(one, schema, of_references, 0) or STRING for name, one in properties.items()}


def _kinds(schema: Any, root: Mapping[str, Any], known: dict[str, frozenset[str]], depth: int) -> frozenset[str]:
    if depth > DEPTH_MAX:
        raise ValueError
    if not isinstance(schema, dict):
        return frozenset()
    found: set[str] = set()
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        found.update(_KIND_OF.get(str(name).lower(), "string") for name in named)
    elif "const" in schema or isinstance(schema.get("enum"), list):
        found.update(map(_kind_of_value, [schema["const"]] if "const" in schema else schema["enum"]))
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema[key] if isinstance(schema.get(key), list) else ():
            found |= _kinds(one, root, known, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = frozenset()  # for one that leads back to itself
            known[reference] = _kinds(_followed(reference, root), root, known, depth + 1)
        found |= known[reference]
    if schema.get("nullable") is True:
        found.add("null")
    if not found:
        found.update(kind for key, kind in (("properties", "object"), ("items", "array")) if key in schema)
    return frozenset(found)


def _followed(reference: str, root: Mapping[str, Any]) -> Any:
    """A place in the same document; None for any other."""
    if not reference.startswith("#/"):
        return None
    place: Any = root
    for key in reference[2:].split("/"):
        place = place.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def _kind_of_value(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "string")


def as_json(text: str, kinds: Iterable[str]) -> str:
    """A value as JSON. What is of no kind that is allowed stays what it is as JSON, else a string."""
    wanted = [read for kind, read in _READ.items() if kind in kinds]
    if "string" not in kinds:
        wanted.append(_loaded)
    for read in wanted:
        try:
            return _dumped(read(text))
        except (ValueError, RecursionError):
            continue
    return _dumped(text)


def string_as_json(text: str) -> str:
    """A string's inside, without its quotes. Parts together are the whole's."""
    return _dumped(text)[1:-1]


def _null(text: str) -> None:
    if text.strip().lower() != "null":
        raise ValueError


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError
    return int(text)


def _number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _DECIMAL.fullmatch(text) or not math.isfinite(value := float(text)):
        raise ValueError
    return int(value) if value.is_integer() and abs(value) < _EXACT_INTEGERS else value


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
    except KeyError:
        raise ValueError from None


def _loaded(text: str) -> Any:
    return json.loads(text)


def _object(text: str) -> dict[str, Any]:
    if not isinstance(value := _loaded(text), dict):
        raise ValueError
    return value


def _array(text: str) -> list[Any]:
    if not isinstance(value := _loaded(text), list):
        raise ValueError
    return value


_READ: dict[str, Callable[[str], Any]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
    "array": _array,
}


def _dumped(value: Any) -> str:
    """Raises ValueError for NaN and infinities, also deep inside."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape: only as one can it go on
        text = json.dumps(value, allow_nan=False)
    return text

"""Random JSON Schemas whose values end, so that a random model can finish: all lengths are bounded."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ("^[a-f0-9]{4}$", "^(yes|no)$", "^[A-Z][a-z]{1,5}$", "^\\d{1,3}/\\d{1,3}$", "^v[0-9]$")
NAMES = ("id", "name", "Größe", "is ok", "tags", "a.b", "x-y", "日", 'quo"te')


def bounded_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """Also with $defs, at its root."""
    schema = _any(chance, depth)
    if chance.random() < 0.2:
        shared = _any(chance, 1)
        schema = {"$defs": {"shared": shared}, "anyOf": [{"$ref": "#/$defs/shared"}, schema]}
    return schema


def _any(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _listed, _flag]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _either]
    return chance.choice(kinds)(chance, depth)


def _string(chance: random.Random, _depth: int) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"type": "string", "pattern": chance.choice(PATTERNS)}
    least = chance.randrange(4)
    return {"type": ["string", "null"], "minLength": least, "maxLength": least + chance.randrange(12)}


def _integer(chance: random.Random, _depth: int) -> dict[str, Any]:
    least = chance.randrange(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + chance.randrange(10**6)}


def _number(chance: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": chance.choice((1, 99.5, 1000)), "multipleOf": 0.5}


def _listed(chance: random.Random, _depth: int) -> dict[str, Any]:
    values = ["red", "", 7, -1.5, True, None, {"a": []}, [1, "x"], "ü\n"]
    if chance.random() < 0.3:
        return {"const": chance.choice(values)}
    return {"enum": chance.sample(values, chance.randrange(1, 5))}


def _flag(chance: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": chance.choice(["boolean", "null", ["boolean", "null"]])}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(NAMES, chance.randrange(5))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: _any(chance, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    items, least = _any(chance, depth - 1), chance.randrange(2)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + chance.randrange(4)}


def _either(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(chance, depth - 1) for _ in range(chance.randrange(1, 4))]}

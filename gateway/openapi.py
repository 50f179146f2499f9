"""/openapi.json beyond what the framework finds in the routes: every status that an endpoint can answer, what it
then says, what it reads, and the keys. Validation is ours, and so are its errors: the framework's are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from gateway import elastic, loads
from gateway.messages.errors import PATH as MESSAGES

OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/version"})  # probes and scrapers have no key

_ADMIN_PREFIX = "/v1/admin/"


def is_for_admins(path: str) -> bool:
    """Whether it opens to the admin key alone, where there is one."""
    return path.startswith(_ADMIN_PREFIX) or path in elastic.PATHS


ERRORS = {
    400: "a field, its value and what is accepted; or no JSON",
    401: "no key, or a wrong one",
    403: "a key that opens other doors, or a page of another origin",
    404: "no such model",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "refused for load, or a limit of the key; Retry-After says when to come back",
    431: "the request line and headers are too large",
    500: "the cluster gave the call up, or failed",
    503: "not ready; Retry-After says when to come back",
    504: "the call's time was up",
}
_ANYWHERE = (431, 500)
_GUARDED = (401, 403, 429)
_WITH_BODY = (400, 408, 413, 415)
_ADMIN = (400, 503)
_GENERATING = (404, 503, 504)
_OF_PATH = {
    "/ready": (503,),
    "/v1/models/{name}": (404,),
    "/tokenize": (404,),
    "/detokenize": (404,),
    f"{MESSAGES}/count_tokens": (400, 404),
    MESSAGES: (400,),
    "/v1/loads": (400, 503),
    "/server_info": (503,),
}

_JSON, _TEXT, _EVENTS = "application/json", "text/plain", "text/event-stream"
_SAYS: dict[str, tuple[str, ...]] = {
    "/health": (),
    "/ping": (),
    "/metrics": (_TEXT,),
    "/v1/loads": (_JSON, _TEXT),
    f"{MESSAGES}/count_tokens": (_JSON,),
    "/v1/admin/events": (_EVENTS,),
}
_STREAMED = (_JSON, _EVENTS)

_WORKERS = {
    "type": ["integer", "null"],
    "minimum": 1,
    "maximum": 256,
    "description": "workers; null: as many as now",
}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/admin/scale": {"attention": _WORKERS, "experts": _WORKERS},
    elastic.PATHS[0]: elastic.FIELDS,
    "/v1/admin/drain": {"worker": {"type": "string", "minLength": 1, "description": "id of the worker to leave"}},
}
_SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": 60, "default": 5}
_PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "/v1/admin/trace": [{"name": "seconds", "in": "query", "required": False, "schema": _SECONDS}],
    "/v1/admin/rebalance": [
        {"name": "dry_run", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}
    ],
    "/v1/loads": [
        {"name": "include", "in": "query", "required": False, "schema": {"type": "string", "default": "all"}},
        {"name": "format", "in": "query", "required": False, "schema": {"enum": list(loads.FORMATS)}},
    ],
}
_ERROR_FIELDS = {
    "message": {"type": "string"},
    "type": {"type": "string"},
    "param": {"type": ["string", "null"]},
    "code": {"type": "string"},
}


def describe(app: FastAPI) -> None:
    """Once its routes are there. What a route says of itself stays."""
    found = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(found())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    said = {"type": "string"}
    components["schemas"] = {
        "Error": _object(error=_object(**_ERROR_FIELDS)),
        "MessagesError": _object(type={"const": "error"}, error=_object(type=said, message=said)),
        **_without_theirs(components),
    }
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["security"] = [] if path in OPEN_PATHS else [{"bearer": []}, {"x-api-key": []}, {}]
            if fields := _BODIES.get(path):
                content = {
                    _JSON: {"schema": {"type": "object", "properties": fields, "additionalProperties": False}}
                }
                operation["requestBody"] = {"required": True, "content": content}
            if path in _PARAMETERS:
                operation["parameters"] = _PARAMETERS[path]
            is_generating = method == "post" and path.startswith("/v1/") and not is_for_admins(path)
            answers = operation["responses"]
            answers.pop("422", None)
            says = _SAYS.get(path, _STREAMED if is_generating else (_JSON,))
            answers["200"]["content"] = {kind: answers["200"].get("content", {}).get(kind, {}) for kind in says}
            shape = "MessagesError" if path.startswith(MESSAGES) else "Error"
            for status in _statuses(path, is_generating, "requestBody" in operation):
                answers.setdefault(str(status), _error(status, shape))


def _statuses(path: str, is_generating: bool, has_body: bool) -> Iterator[int]:
    yield from _ANYWHERE
    yield from () if path in OPEN_PATHS else _GUARDED
    yield from _WITH_BODY if has_body else ()
    yield from _ADMIN if is_for_admins(path) else ()
    yield from _GENERATING if is_generating else ()
    yield from _OF_PATH.get(path, ())


def _error(status: int, name: str) -> dict[str, Any]:
    content = {_JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"description": ERRORS[status], "content": content}


def _object(**properties: Any) -> dict[str, Any]:
    """Of just these."""
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


def _without_theirs(components: dict[str, Any]) -> dict[str, Any]:
    schemas = components.get("schemas", {})
    return {name: schema for name, schema in schemas.items() if not name.endswith("ValidationError")}

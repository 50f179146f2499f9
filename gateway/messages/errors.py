"""Refusals in Anthropic's shape. Statuses are those of every other endpoint; a type says what each means there."""

from __future__ import annotations

from typing import Any

from gateway.errors import Refusal

PATH = "/v1/messages"  # and below: whoever calls these reads errors in this shape

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(error: Refusal) -> dict[str, Any]:
    return {"type": "error", "error": {"type": error_type(error.status), "message": error.message}}

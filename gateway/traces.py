"""Step traces as REST gives them: what attention workers said, opaque here, in JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from expertmesh.v1.control_pb2 import TraceReply

from gateway.errors import invalid

SECONDS_MAX = 60.0  # as the controller's
SECONDS = 5.0  # unless something else is asked for
_ACCEPTED = f"a number of seconds above 0, at most {SECONDS_MAX:g}"


def trace_seconds(query: Mapping[str, str]) -> float:
    """How far back. Raises BadRequest."""
    for name in query:
        if name != "seconds":
            raise invalid(name, query[name], "no such parameter; known: seconds")
    given = query.get("seconds", str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        raise invalid("seconds", given, _ACCEPTED) from None
    return checked_seconds(seconds)


def checked_seconds(seconds: float) -> float:
    """Raises BadRequest."""
    if not (math.isfinite(seconds) and 0 < seconds <= SECONDS_MAX):
        raise invalid("seconds", seconds if math.isfinite(seconds) else str(seconds), _ACCEPTED)
    return seconds


def trace_document(reply: TraceReply) -> dict[str, Any]:
    """`traces`: of each attention worker, base64; `silent`: who did not answer in time."""
    return {"traces": [base64.b64encode(trace).decode() for trace in reply.traces], "silent": list(reply.silent)}

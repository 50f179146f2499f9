"""Pools resized through the gateway: what is asked is read here, decided by the controller, and answered by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from expertmesh.v1.control_pb2 import ResizeReply, ResizeRequest
from starlette.requests import Request

from gateway import bodies
from gateway.errors import BadRequest, NotReady, invalid
from gateway.state import GatewayState

_INT64 = 2**63
_SIZE = "a whole number of workers, or null for as many as now"
_NAME = "the id of a worker, see /v1/admin/status"


def scale_request(body: dict[str, Any]) -> ResizeRequest:
    """Of POST /v1/admin/scale. Raises BadRequest."""
    _refuse_unknown(body, ("attention", "experts"))
    sizes = {name: size for name, size in body.items() if size is not None}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or abs(size) >= _INT64:
            raise invalid(name, size, _SIZE)
    return ResizeRequest(**sizes)


def drain_request(body: dict[str, Any]) -> ResizeRequest:
    """Of POST /v1/admin/drain. Raises BadRequest."""
    _refuse_unknown(body, ("worker",))
    worker = body.get("worker")
    if not isinstance(worker, str) or not worker:
        raise invalid("worker", worker, _NAME)
    return ResizeRequest(drain=worker)


async def resize_from_body(
    state: GatewayState, request: Request, read: Callable[[dict[str, Any]], ResizeRequest]
) -> dict[str, Any]:
    """What REST answers: the pools as they are to be and as they are. Raises Refusal."""
    async with state.intake.body(request) as raw:
        asked = read(bodies.parse(raw, request.headers.get("content-type", "")))
    return {"pools": (await resized(state, asked))["pools"]}


async def resized(state: GatewayState, asked: ResizeRequest) -> dict[str, Any]:
    """The status document after the controller has agreed. Raises BadRequest with its reason, or NotReady."""
    reply: ResizeReply = await state.asked(state.resize(asked))
    if reply.HasField("refused"):
        refused = reply.refused
        told = f"{refused.field} is {refused.value}; accepted: {refused.accepted}"
        raise BadRequest(told, param=refused.field)
    if reply.not_kept:
        raise NotReady(reply.not_kept, retry_after_s=state.config.retry_after_s)
    document: dict[str, Any] = json.loads(reply.json)
    return document


def _refuse_unknown(body: dict[str, Any], known: tuple[str, ...]) -> None:
    """A misspelt size would change nothing, and look as if it had."""
    for name, value in body.items():
        if name not in known:
            raise invalid(name, value, f"no such field; known: {', '.join(known)}")

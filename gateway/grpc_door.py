"""Around every gRPC call of ours: the API key and its limits, messages that are none, errors as statuses, a line
in the log, and the call's name and trace in its trailing metadata.

Health and reflection are open, as REST's probes are.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gateway.errors import BadRequest, Refusal
from gateway.grpc_errors import Behaviour, Context, abort, told
from gateway.keys import Keeper
from gateway.visit import VISIT, Visit

_OPEN = ("/grpc.health.", "/grpc.reflection.")
_ADMIN = "/expertmesh.v1.AdminService/"

Handler: TypeAlias = Any  # grpc.RpcMethodHandler or, for an unknown method, None; its stub knows no coroutines


class GrpcDoor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        if method.startswith(_OPEN):
            return await continuation(handler_call_details)
        metadata = {
            key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)
        }
        visit = Visit.of(metadata)
        keys = metadata.get("authorization", ""), metadata.get("x-api-key", "")
        try:
            visit.guest = self._keeper.admit(*keys, is_admin=method.startswith(_ADMIN))
        except Refusal as error:
            return _refusing(error, visit, method)
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler, visit, method)


def _refusing(error: Refusal, visit: Visit, method: str) -> Handler:
    async def refuse(_requests: Any, context: Context) -> None:
        context.set_trailing_metadata(tuple(visit.headers().items()))
        visit.log(method, str(error.status), 0.0)
        await abort(context, error)

    # The widest shape answers calls of every shape without waiting for a request.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _guarded(handler: Handler, visit: Visit, method: str) -> Handler:
    """The same; what cannot be decoded arrives at the behaviour as None, because the library would tell its own
    exception's text."""
    assert not handler.request_streaming, "no call of ours takes a stream"
    decode, encode = handler.request_deserializer, handler.response_serializer

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            return None

    def entered(behaviour: Behaviour) -> Behaviour:
        return told(_visited(_decoded_only(behaviour), visit, method))

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(entered(handler.unary_stream), decoded, encode)
    return grpc.unary_unary_rpc_method_handler(entered(handler.unary_unary), decoded, encode)


def _visited(behaviour: Behaviour, visit: Visit, method: str) -> Behaviour:
    async def answered(request: Any, context: Context) -> Any:
        VISIT.set(visit)
        began_s, outcome = time.monotonic(), "hung_up"
        context.set_trailing_metadata(tuple(visit.headers().items()))
        try:
            with visit.open():
                answer = await behaviour(request, context)
            outcome = "ok"
            return answer
        except Refusal as error:
            outcome = str(error.status)
            raise
        except Exception:
            outcome = "500"
            raise
        finally:
            visit.log(method, outcome, time.monotonic() - began_s)

    return answered


def _decoded_only(behaviour: Behaviour) -> Behaviour:
    async def answered(request: Any, context: Context) -> Any:
        if request is None:
            raise BadRequest(
                "the message cannot be decoded; accepted: the method's request, see reflection",
                code="invalid_message",
            )
        return await behaviour(request, context)

    return answered

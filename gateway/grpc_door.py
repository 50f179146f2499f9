"""Around every gRPC call of ours: the API key, messages that are none, and errors as statuses.

Health and reflection are open, as REST's probes are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gateway.errors import BadRequest, Unauthorized
from gateway.grpc_errors import Behaviour, Context, abort, told
from gateway.keys import Keeper

OURS = "/expertmesh."

Handler: TypeAlias = Any  # grpc.RpcMethodHandler or, for an unknown method, None; its stub knows no coroutines


class GrpcDoor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        if not handler_call_details.method.startswith(OURS):
            return await continuation(handler_call_details)
        metadata = {
            key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)
        }
        try:
            self._keeper.check(metadata.get("authorization", ""), metadata.get("x-api-key", ""))
        except Unauthorized as error:
            return _refusing(error)
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler)


def _refusing(error: Unauthorized) -> Handler:
    async def refuse(_requests: Any, context: Context) -> None:
        await abort(context, error)

    # The widest shape answers calls of every shape without waiting for a request.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _guarded(handler: Handler) -> Handler:
    """The same; what cannot be decoded arrives at the behaviour as None, because the library would tell its own
    exception's text."""
    assert not handler.request_streaming, "no call of ours takes a stream"
    decode, encode = handler.request_deserializer, handler.response_serializer

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            return None

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(told(_decoded_only(handler.unary_stream)), decoded, encode)
    return grpc.unary_unary_rpc_method_handler(told(_decoded_only(handler.unary_unary)), decoded, encode)


def _decoded_only(behaviour: Behaviour) -> Behaviour:
    async def answered(request: Any, context: Context) -> Any:
        if request is None:
            raise BadRequest(
                "the message cannot be decoded; accepted: the method's request, see reflection",
                code="invalid_message",
            )
        return await behaviour(request, context)

    return answered

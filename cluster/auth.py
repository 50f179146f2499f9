"""The cluster's token on its own links: one shared secret, checked before a message is read.

TLS is a matter of the address's credentials, not of this file.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

HEADER = "authorization"


def auth_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a client sends with each call."""
    return ((HEADER, f"Bearer {token}"),)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Ends every call that does not carry the token with UNAUTHENTICATED, in constant time."""

    def __init__(self, token: str) -> None:
        if not token:
            raise ValueError("token is empty, accepted: one character or more")
        self._expected = f"Bearer {token}".encode()
        # The widest shape answers calls of every shape without waiting for a request.
        self._refuse = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        presented = b""
        for key, value in handler_call_details.invocation_metadata:
            if key == HEADER and isinstance(value, str):
                presented = value.encode()
        if hmac.compare_digest(presented, self._expected):
            return await continuation(handler_call_details)
        return self._refuse


async def _refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{HEADER}: the cluster's token is required")

"""Server-sent events by hand, and work that ends when its client does.

A client that hangs up, or leaves its socket full for `client_stall_s_max`, is gone: the work for it is
cancelled there and then, whether its answer is streamed or not. Listening is one pending `receive()`, not
polling.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ClientGone

Result = TypeVar("Result")

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy that buffers would hold tokens back
}


@dataclass(frozen=True)
class Framing:
    """Events as bytes, and what comes after the last."""

    event: Callable[[dict[str, Any]], bytes]
    end: bytes


def _unnamed(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def _named(payload: dict[str, Any]) -> bytes:
    return f"event: {payload['type']}\n".encode() + _unnamed(payload)


UNNAMED = Framing(_unnamed, b"data: [DONE]\n\n")
NAMED = Framing(_named, b"")  # each by its type; the last one says that it is the last


async def told(payloads: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """Each as an event; closed, it closes them."""
    async with aclosing(payloads) as those:
        async for payload in those:
            yield UNNAMED.event(payload)


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, or ClientGone if the client hangs up first; then `work` was cancelled.

    Only once the request's body has been read: what `receive` still gives is the hang-up.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client hung up")
        return task.result()
    finally:
        task.cancel()
        listener.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Writes events until they end or the client does; `on_end` is told whether it stayed, in any case."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        stall_s_max: float,
        on_end: Callable[[bool], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._events = events
        self._stall_s_max = stall_s_max
        self._on_end = on_end

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        stayed = False
        try:
            await unless_hung_up(receive, self._write(send))
            stayed = True
        except ClientGone:
            return  # there is nobody to tell
        finally:
            self._on_end(stayed)

    async def _write(self, send: Send) -> None:
        await self._within(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
        async with aclosing(self._events) as events:
            async for chunk in events:
                await self._within(send({"type": "http.response.body", "body": chunk, "more_body": True}))
        await self._within(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _within(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._stall_s_max):
                await sending
        except (TimeoutError, OSError) as error:
            raise ClientGone("the client does not read") from error

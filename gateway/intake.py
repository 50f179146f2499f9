"""Request bodies on their way in: each within bounds of size and time, all of them together within one of size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from gateway.config import GatewayConfig
from gateway.errors import BodyTooLarge, ClientGone, Overloaded, TooSlow


class Intake:
    """Counts what has arrived, not what was announced: who announces and sends nothing takes no room."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.num_bytes = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """The whole body; it takes room until the block ends.

        Raises BodyTooLarge and Overloaded, by a declared length before anything is read; TooSlow; ClientGone.
        """
        body = bytearray()
        try:
            await self._fill(body, request)
            yield body
        finally:
            self.num_bytes -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        declared = request.headers.get("content-length", "")
        announced = int(declared) if declared.isascii() and declared.isdigit() else 0
        self._check(announced, announced)
        try:
            async with asyncio.timeout(self._config.client_stall_s_max):
                async for chunk in request.stream():
                    self._check(len(body) + len(chunk), len(chunk))
                    body += chunk
                    self.num_bytes += len(chunk)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {self._config.client_stall_s_max:g} s") from None
        except ClientDisconnect:
            raise ClientGone("the client hung up before its request was complete") from None

    def _check(self, size: int, more: int) -> None:
        """A body of `size` bytes, of which `more` are not counted yet."""
        config = self._config
        if size > config.body_bytes_max:
            raise BodyTooLarge(f"the body is too large; accepted: at most {config.body_bytes_max:,} bytes")
        if self.num_bytes + more > config.bodies_bytes_max:
            raise Overloaded(
                f"request bodies of {self.num_bytes:,} bytes are being read; this gateway reads at most "
                f"{config.bodies_bytes_max:,} at once",
                retry_after_s=config.retry_after_s,
            )

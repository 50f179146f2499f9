"""Runs the HTTP application with uvicorn inside an event loop that others share. Signals are their business."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from gateway import tls
from gateway.config import GatewayConfig
from gateway.connection import Connection
from gateway.errors import CannotListen, PortInUse


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises PortInUse or CannotListen, naming both."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CannotListen(f"{host}:{port}", f"no such address: {error.strerror}") from error
    listener = socket.socket(family, kind, proto)
    try:
        # Without it a restarted server waits a minute for old connections; it does not allow two listeners.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        raise CannotListen(f"{host}:{port}", error.strerror or str(error)) from error
    return listener


class HttpServer:
    """Takes the port at birth, so that it is known to be free before anything else is begun."""

    def __init__(self, host: str, port: int) -> None:
        self._listener = bind(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp, limits: GatewayConfig, *, stop_timeout_s: float) -> None:
        """Serve `app`; returns once connections are accepted. Calls get `stop_timeout_s` when stopped.

        Raises TlsUnusable.
        """
        context = tls.server_context(limits)
        config = uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], partial(Connection, limits)),
            access_log=False,
            log_config=None,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=limits.client_idle_s,
            timeout_graceful_shutdown=max(1, round(stop_timeout_s)),
            ssl_context_factory=None if context is None else lambda _config, _default: context,
        )
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http-server")
        is_up = asyncio.create_task(self._server.is_up.wait())
        await asyncio.wait({is_up, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        if not is_up.done():
            is_up.cancel()
            await self._serving  # raises why

    async def stop(self) -> None:
        """No new connections, calls in flight end within their time. Idempotent."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._server = self._serving = None
        self._listener.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, telling when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

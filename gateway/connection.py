"""One HTTP connection, within the bounds that uvicorn leaves open: their number, and a head's size and time.

What uvicorn's parser holds without passing it on (a head, trailers) may take `head_bytes_max` and what one read
brings; what it passes on is bounded by `intake`. What is no HTTP is refused in OpenAI's shape, like all else.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config import GatewayConfig
from gateway.errors import BadRequest, HeadTooLarge, Overloaded, Refusal, TooSlow


class Connection(HttpToolsProtocol):
    def __init__(self, limits: GatewayConfig, **given: Any) -> None:
        """`given`: by uvicorn, for each connection."""
        super().__init__(**given)
        self._limits = limits
        self._held_bytes = 0  # received since the parser last passed something on
        self._has_passed_on = False  # with this read
        self._head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections_max:
            bound = f"this gateway holds at most {self._limits.connections_max} connections"
            self._refuse(Overloaded(bound, retry_after_s=self._limits.retry_after_s))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_passed_on = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._held_bytes = 0 if self._has_passed_on else self._held_bytes + len(data)
        if self._held_bytes > self._limits.head_bytes_max:
            bound = f"{self._limits.head_bytes_max:,} bytes"
            self._refuse(HeadTooLarge(f"the request line and headers are too large; accepted: at most {bound}"))
        elif self._is_idle and self._head_due is None:
            self._await_head()

    def send_400_response(self, _msg: str) -> None:
        self._refuse(BadRequest("what was sent is not HTTP; accepted: HTTP/1.0 and HTTP/1.1", code="invalid_http"))

    # What the parser passes on.

    def on_headers_complete(self) -> None:
        self._has_passed_on = True
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_passed_on = True
        super().on_body(body)

    # Time.

    @property
    def _is_idle(self) -> bool:
        """No call is being answered: what comes is the next head, or nobody's."""
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_due = self.loop.call_later(self._limits.client_stall_s_max, self._head_did_not_come)

    def _head_came(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _head_did_not_come(self) -> None:
        """Who has said nothing is told nothing: a client that has connected ahead would take it for an answer."""
        self._head_due = None
        if self._held_bytes:
            self._refuse(TooSlow(f"no request arrived within {self._limits.client_stall_s_max:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: Refusal) -> None:
        """Say so unless an answer is being written, and hang up."""
        if self._is_idle:
            body, status = orjson.dumps(error.body()), HTTPStatus(error.status)
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
            lines += [f"{name}: {value}" for name, value in {**headers, **error.headers()}.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

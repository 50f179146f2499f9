"""One generating call from HTTP request to HTTP response, whatever its dialect.

Everything that can be refused is refused before the response begins: for load before the body is read, then for
its body, its fields, or by the scheduler. After that an error is the stream's last event but one. However a call
ends, what it had open is cancelled.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway import bodies
from gateway.dialect import Dialect
from gateway.errors import BadRequest, ClientGone, Refusal
from gateway.metrics import Meter
from gateway.model_card import ModelCard
from gateway.running import Running, beside, outcome
from gateway.state import GatewayState
from gateway.stream import EventStream, unless_hung_up
from gateway.text import Piece
from gateway.validate import Call, Validator

_LOGPROB_BYTES = 64

_log = logging.getLogger(__name__)


Read = TypeVar("Read")
Plan = Callable[[Validator, dict[str, Any]], Call]
Work = Callable[[Validator, dict[str, Any]], dict[str, Any]]
Speak = Callable[[Call, ModelCard], Dialect]


async def answer(state: GatewayState, request: Request, endpoint: str, plan: Plan, speak: Speak) -> Response:
    """`plan` validates a body, `speak` writes the answer. Raises Refusal before the response begins."""
    meter = Meter(state.metrics, endpoint)
    try:
        state.check_open()
        call, dialect = await _read(state, request, lambda *given: _spoken(state, speak, plan(*given)))
        call = state.admitted(call)
        generation = await unless_hung_up(request.receive, state.ledger.open(call.requests))
        running = Running(state, call, generation, meter, dialect.marked)
        told = _Answer(running, call, dialect, meter)
        headers = {"x-expertmesh-ignored-fields": listed(call.ignored)} if call.ignored else {}
        if call.stream:
            return EventStream(told.events(), headers, state.config.client_stall_s_max, told.end)
        try:
            whole = await unless_hung_up(request.receive, told.whole())
        finally:
            running.close()
        meter.end("ok")
        return Response(orjson.dumps(whole), media_type="application/json", headers=headers)
    except BaseException as error:
        meter.end(outcome(error))
        raise


def _spoken(state: GatewayState, speak: Speak, call: Call) -> tuple[Call, Dialect]:
    if call.ignored and state.config.unknown_fields == "refuse":
        raise BadRequest(
            f"{listed(call.ignored)}: not read here; accepted: fields that are (gateway.unknown_fields: refuse)",
            param=call.ignored[0],
            code="unknown_field",
        )
    return call, speak(call, state.card)


async def answer_at_once(state: GatewayState, request: Request, endpoint: str, work: Work) -> Response:
    """For what takes no worker: `work` makes the answer of a body."""
    meter = Meter(state.metrics, endpoint)
    try:
        payload = await _read(state, request, work)
        meter.end("ok")
        return Response(orjson.dumps(payload), media_type="application/json")
    except BaseException as error:
        meter.end(outcome(error))
        raise


async def _read(state: GatewayState, request: Request, work: Callable[[Validator, dict[str, Any]], Read]) -> Read:
    """What `work` makes of a request's body; large ones are worked on in a thread."""
    content_type = request.headers.get("content-type", "")
    validator = Validator(state.card, state.config, state.model_len_max)
    async with state.intake.body(request) as raw:
        may_wait = bodies.may_have_grammar(raw)
        return await beside(len(raw), lambda: work(validator, bodies.parse(raw, content_type)), may_wait=may_wait)


def listed(names: Sequence[str]) -> str:
    """Names from a client's JSON as a header value: made safe, at most 32 of 64 characters."""
    return ", ".join(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in names[:32])


class _Answer:
    """A running call in its dialect's words."""

    def __init__(self, running: Running, call: Call, dialect: Dialect, meter: Meter) -> None:
        self._running = running
        self._call = call
        self._dialect = dialect
        self._meter = meter
        self._trouble: BaseException | None = None

    async def whole(self) -> dict[str, Any]:
        choices = await self._running.choices()
        size = sum(map(self._size, choices))
        return await beside(size, lambda: self._dialect.whole(choices, self._running.usage))

    async def events(self) -> AsyncGenerator[bytes, None]:
        dialect = self._dialect
        event = dialect.framing.event
        try:
            for payload in dialect.opening():
                yield event(payload)
            async with aclosing(self._running.pieces()) as pieces:
                async for piece in pieces:
                    for payload in await beside(self._size(piece), partial(self._chunks, piece)):
                        yield event(payload)
            for payload in dialect.closing(self._running.usage):
                yield event(payload)
        except Exception as error:
            # The response has begun: the client can only be told in it, and of a bug we in the log.
            self._trouble = error
            if not isinstance(error, Refusal):
                _log.exception("call %s failed", self._call.id)
                error = Refusal("internal error")
            for payload in dialect.failed(error):
                yield event(payload)
        if dialect.framing.end:
            yield dialect.framing.end

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return list(self._dialect.chunks(piece))

    def _size(self, piece: Piece) -> int:
        """Bytes, about, of what its prompt's logprobs are as JSON; the rest of a piece is small."""
        num_each = 1 + (self._call.requests[0].num_prompt_logprobs or 0)
        return len(piece.prompt_logprobs) * num_each * _LOGPROB_BYTES

    def end(self, stayed: bool) -> None:
        """The stream is over: cancel what is left of the call."""
        self._running.close()
        trouble = self._trouble or (None if stayed else ClientGone("the client hung up"))
        self._meter.end("ok" if trouble is None else outcome(trouble))

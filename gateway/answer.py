"""One generating call from HTTP request to HTTP response, whatever its dialect.

Everything that can be refused is refused before the response begins: body, fields, admission. After that an
error is the stream's last event but one. However a call ends, what it had open is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gateway import bodies
from gateway.config import GatewayConfig
from gateway.errors import BodyTooLarge, ClientGone, NotReady, Refusal, TooSlow
from gateway.ledger import Generation
from gateway.metrics import Meter
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.state import GatewayState
from gateway.stream import DONE, EventStream, event, unless_hung_up
from gateway.text import ChoiceText, Piece, joined
from gateway.validate import Call, Validator

_log = logging.getLogger(__name__)

_IN_LOOP_BYTES_MAX = 32_768  # larger bodies are rendered and tokenised in a thread: 100 KB take some 30 ms


class Dialect(Protocol):
    """How one API writes a call's answer. Streamed: opening, chunks of each piece, closing if usage is wanted."""

    def opening(self) -> Iterable[dict[str, Any]]: ...

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]: ...

    def closing(self, usage: Usage) -> dict[str, Any]: ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]: ...


Plan = Callable[[Validator, dict[str, Any]], Call]
Speak = Callable[[Call, ModelCard], Dialect]


async def answer(state: GatewayState, request: Request, endpoint: str, plan: Plan, speak: Speak) -> Response:
    """`plan` validates a body, `speak` writes the answer. Raises Refusal before the response begins."""
    meter = Meter(state.metrics, endpoint)
    try:
        if state.is_draining:
            raise NotReady(state.not_ready, retry_after_s=state.config.retry_after_s)
        call = await _call(state, request, plan)
        generation = await unless_hung_up(request.receive, state.ledger.open(call.requests))
        running = _Running(state, call, generation, meter, speak(call, state.card))
        headers = {"x-expertmesh-ignored-fields": listed(call.ignored)} if call.ignored else {}
        if call.stream:
            return EventStream(running.events(), headers, state.config.client_stall_s_max, running.end)
        try:
            whole = await unless_hung_up(request.receive, running.whole())
        finally:
            generation.close()
        meter.end("ok")
        return Response(orjson.dumps(whole), media_type="application/json", headers=headers)
    except BaseException as error:
        meter.end(_outcome(error))
        raise


async def _call(state: GatewayState, request: Request, plan: Plan) -> Call:
    raw = await read_body(request, state.config)
    validator = Validator(state.card, state.config, state.model_len_max)
    content_type = request.headers.get("content-type", "")
    if len(raw) <= _IN_LOOP_BYTES_MAX:
        return plan(validator, bodies.parse(raw, content_type))
    return await asyncio.to_thread(lambda: plan(validator, bodies.parse(raw, content_type)))


async def read_body(request: Request, config: GatewayConfig) -> bytes:
    """The whole body, within bounds of size and time. Raises BodyTooLarge, TooSlow, ClientGone."""
    too_large = BodyTooLarge(f"the body is too large; accepted: at most {config.body_bytes_max:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > config.body_bytes_max:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.client_stall_s_max):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.body_bytes_max:
                    raise too_large
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {config.client_stall_s_max:g} s") from None
    except ClientDisconnect:
        raise ClientGone("the client hung up before its request was complete") from None
    return bytes(body)


def listed(names: Sequence[str]) -> str:
    """Names from a client's JSON as a header value: made safe, at most 32 of 64 characters."""
    return ", ".join(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in names[:32])


class _Running:
    """An admitted call on its way to the client."""

    def __init__(
        self, state: GatewayState, call: Call, generation: Generation, meter: Meter, dialect: Dialect
    ) -> None:
        self._state = state
        self._call = call
        self._generation = generation
        self._meter = meter
        self._dialect = dialect
        self._usage = Usage(call.num_prompt_tokens)
        self._trouble: BaseException | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text and tokens as they come; a stop string ends its choice at the worker, too."""
        card, texts = self._state.card, dict[int, ChoiceText]()
        async for choice, delta in self._generation:
            if choice not in texts:
                texts[choice] = ChoiceText(choice, self._call.request_of(choice), card.tokens, card.eos)
            piece = texts[choice].take(delta)
            if piece.finish is not None and delta.finish is None:
                self._generation.finish(choice, delta.position + len(piece.tokens) - 1)
            self._usage.completion_tokens += len(piece.tokens)
            if piece.tokens:
                self._meter.tokens(choice, len(piece.tokens))
            yield piece

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            choices.setdefault(piece.choice, []).append(piece)
        return self._dialect.whole([joined(choices[choice]) for choice in sorted(choices)], self._usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for payload in self._dialect.opening():
                yield event(payload)
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    for payload in self._dialect.chunks(piece):
                        yield event(payload)
            if self._call.include_usage:
                yield event(self._dialect.closing(self._usage))
        except Refusal as error:
            self._trouble = error
            yield event(error.body())
        except Exception as error:
            # The response has begun: the client can only be told in it, and we in the log.
            _log.exception("call %s failed", self._call.id)
            self._trouble = error
            yield event(Refusal("internal error").body())
        yield DONE

    def end(self, stayed: bool) -> None:
        """The stream is over: cancel what is left of the call."""
        self._generation.close()
        trouble = self._trouble or (None if stayed else ClientGone("the client hung up"))
        self._meter.end("ok" if trouble is None else _outcome(trouble))


def _outcome(error: BaseException) -> str:
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return "hung_up"
    return str(error.status) if isinstance(error, Refusal) else "500"

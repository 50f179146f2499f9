"""The inference API over gRPC: the same validation, ledger and text as REST, as messages instead of JSON.

A call ends when it is done, when its client hangs up or does not read, when its deadline passes, or when `Cancel`
names it; however it ends, what it had open in the cluster is cancelled before its end is told.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from expertmesh.v1 import inference_pb2, inference_pb2_grpc

from gateway import inference_wire as wire
from gateway.errors import AlreadyExists, ClientGone, DeadlinePassed, NotFound, invalid
from gateway.grpc_errors import Context, begin, write
from gateway.metrics import Meter
from gateway.prompts import unknown_model
from gateway.running import Running, beside, outcome
from gateway.state import GatewayState
from gateway.validate import Call, Validator

NAME = "expertmesh.v1.InferenceService"


@dataclass
class _Open:
    """A call by its name. `limit` is its deadline; `over` is set once nothing of it is left."""

    limit: asyncio.Timeout
    is_cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        if not self.limit.expired():
            self.is_cancelled = True
            self.limit.reschedule(asyncio.get_running_loop().time())


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, state: GatewayState) -> None:
        self._state = state
        self._open: dict[str, _Open] = {}  # bounded by `grpc_rpcs_max`

    # --- generating ----------------------------------------------------------------------------

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        async with self._running(request, context, "grpc_generate") as (name, call, running):
            pieces = await running.choices()
        return inference_pb2.GenerateResponse(
            request_id=name,
            model=self._state.card.name,
            choices=[wire.choice(piece, 0) for piece in pieces],
            usage=wire.usage(running.usage),
            prompt_logprobs=wire.prompt_logprobs(call, pieces[0]),
        )

    async def GenerateStream(self, request: inference_pb2.GenerateStreamRequest, context: Context) -> None:
        """Writes instead of yielding: wherever it ends it ends in here, not when a generator is collected."""
        async with self._running(request, context, "grpc_generate_stream") as (name, call, running):
            positions: Counter[int] = Counter()
            await begin(context)
            async with aclosing(running.pieces()) as pieces:
                async for piece in pieces:
                    if piece.prompt_logprobs:  # the same for all choices
                        if piece.choice == 0:
                            await self._write(context, wire.prompt_chunk(name, call, piece))
                        continue
                    await self._write(context, wire.chunk(name, piece, positions[piece.choice]))
                    positions[piece.choice] += len(piece.tokens)
            await self._write(context, wire.last_chunk(name, running.usage))

    async def Cancel(
        self, request: inference_pb2.CancelRequest, _context: Context
    ) -> inference_pb2.CancelResponse:
        opened = self._open.get(request.request_id)
        if opened is None:
            error = invalid("request_id", request.request_id, "the name of a call that is open over gRPC")
            raise NotFound(error.message, param="request_id")
        opened.cancel()
        await opened.over.wait()
        return inference_pb2.CancelResponse()

    @asynccontextmanager
    async def _running(
        self, request: wire.AnyGenerate, context: Context, endpoint: str
    ) -> AsyncIterator[tuple[str, Call, Running]]:
        """An admitted call and its name. Raises Refusal; afterwards nothing of it is open, and it is counted."""
        state = self._state
        meter = Meter(state.metrics, endpoint)
        try:
            async with self._named(request.request_id, context) as name:
                state.check_open()
                call = await beside(
                    request.ByteSize(),
                    lambda: wire.call_of(request, self._validator),
                    may_wait=wire.may_have_grammar(request),
                )
                call = state.admitted(call.within(context.time_remaining()))
                generation = await state.ledger.open(call.requests)
                running = Running(state, call, generation, meter)
                try:
                    yield name, call, running
                finally:
                    running.close()
        except BaseException as error:
            meter.end(outcome(error))
            raise
        meter.end("ok")

    @asynccontextmanager
    async def _named(self, given: str, context: Context) -> AsyncIterator[str]:
        """Opens a call under its name, for as long as its client's deadline allows and nobody cancels it."""
        name = given or f"gen-{uuid.uuid4().hex}"
        if not re.fullmatch(r"[\x21-\x7e]{1,128}", name):
            raise invalid("request_id", given, "1 to 128 printable ASCII characters without spaces")
        if name in self._open:
            error = invalid("request_id", name, "a name that no open call has")
            raise AlreadyExists(error.message, param="request_id")
        opened = _Open(asyncio.timeout(context.time_remaining()))
        self._open[name] = opened
        try:
            async with opened.limit:
                yield name
        except TimeoutError:
            if opened.is_cancelled:
                raise ClientGone("the call was cancelled by its request_id") from None
            raise DeadlinePassed("the call's deadline passed before it was done") from None
        finally:
            del self._open[name]
            opened.over.set()

    async def _write(self, context: Context, message: inference_pb2.GenerateStreamResponse) -> None:
        await write(context, message, self._state.config.client_stall_s_max)

    @property
    def _validator(self) -> Validator:
        state = self._state
        return Validator(state.card, state.config, state.model_len_max)

    # --- text and models -----------------------------------------------------------------------

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, _context: Context
    ) -> inference_pb2.TokenizeResponse:
        body = wire.tokenize_body(request)
        answer = await beside(request.ByteSize(), lambda: self._validator.tokenised(body))
        return inference_pb2.TokenizeResponse(tokens=answer["tokens"], max_model_len=answer["max_model_len"])

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, _context: Context
    ) -> inference_pb2.DetokenizeResponse:
        body = wire.detokenize_body(request)
        answer = await beside(request.ByteSize(), lambda: self._validator.detokenised(body))
        return inference_pb2.DetokenizeResponse(text=answer["prompt"])

    async def ListModels(
        self, _request: inference_pb2.ListModelsRequest, _context: Context
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[wire.model(self._state.card, self._state.model_len_max)])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, _context: Context
    ) -> inference_pb2.GetModelResponse:
        if request.name != self._state.card.name:
            raise unknown_model(request.name, self._state.card)
        return inference_pb2.GetModelResponse(model=wire.model(self._state.card, self._state.model_len_max))

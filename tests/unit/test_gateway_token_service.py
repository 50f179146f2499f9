"""Tokens from workers over real gRPC: what is wanted is taken, what is not is named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from expertmesh.v1 import identity_pb2, step_pb2, step_pb2_grpc

from gateway import wire
from gateway.config import GatewayConfig
from gateway.errors import CannotListen, MalformedMessage
from gateway.port import CloseReason
from gateway.request import FinishReason, TokenDelta
from gateway.token_service import TokenService
from tests.unit.gateway_link_world import FINGERPRINT, TOKEN, Stage, ask, attempt, staged


def batch(*deltas: step_pb2.TokenDelta, fingerprint: str = FINGERPRINT) -> step_pb2.TokenBatch:
    return step_pb2.TokenBatch(
        sender=identity_pb2.Incarnation(id="attention-0", number=1), fingerprint=fingerprint, deltas=deltas
    )


@asynccontextmanager
async def worker_stream(stage: Stage, token: str = TOKEN) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stage.identity.token_address) as channel:
        stub = step_pb2_grpc.TokenServiceStub(channel)  # type: ignore[no-untyped-call]
        yield stub.Deliver(metadata=wire.bearer(token))


async def test_tokens_come_from_workers_and_what_is_refused_is_named() -> None:
    """Stale, unknown and malformed deltas come back in an ack; the good one beside them is taken."""
    async with staged() as stage:
        await stage.tokens.start()
        generation = await stage.ledger.open([ask()])
        stage.ledger.deliver(TokenDelta("r", 0, 1, 0, (4,), (-0.5,)))
        stage.ledger.close_attempt("r", 0, 1, CloseReason.WORKER_LOST, "")
        async with worker_stream(stage) as stream:
            await stream.write(
                batch(
                    step_pb2.TokenDelta(attempt=attempt(1), position=1, tokens=[5]),
                    step_pb2.TokenDelta(
                        attempt=attempt(2),
                        position=1,
                        tokens=[6],
                        logprobs=[-1.5],
                        finish=step_pb2.FINISH_REASON_STOP,
                    ),
                    step_pb2.TokenDelta(attempt=attempt(1, name="gone"), tokens=[5]),
                    step_pb2.TokenDelta(attempt=attempt(1, name="odd"), tokens=[5], logprobs=[-1, -2]),
                )
            )
            ack = await stream.read()
            assert list(ack.refused) == [attempt(1), attempt(1, name="gone"), attempt(1, name="odd")]
            await stream.write(batch(step_pb2.TokenDelta(attempt=attempt(1)), fingerprint="beef"))
            assert list((await stream.read()).refused) == [attempt(1)]
        parts = [part async for _, part in generation]
        assert [(p.tokens, p.logprobs, p.finish) for p in parts] == [
            ((4,), (-0.5,), None),
            ((6,), (-1.5,), FinishReason.STOP),
        ]


async def test_the_token_link_needs_its_token() -> None:
    async with staged() as stage:
        await stage.tokens.start()
        async with worker_stream(stage, "wrong") as stream:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_address_belongs_to_one_gateway() -> None:
    """gRPC would let two servers share a port silently."""
    async with staged() as stage:
        await stage.tokens.start()
        second = TokenService(stage.identity, TOKEN, stage.ledger, GatewayConfig(), stage.metrics)
        with pytest.raises(CannotListen, match="cannot listen on unix-abstract"):
            await second.start()


def test_top_logprobs_unfold_to_one_row_per_token() -> None:
    flat = [step_pb2.TopLogprob(token=token, logprob=-token) for token in (1, 2, 3, 4)]
    message = step_pb2.TokenDelta(
        attempt=attempt(3, 1),
        position=5,
        tokens=[1, 3],
        logprobs=[-1, -3],
        top_logprobs=flat,
        finish=step_pb2.FINISH_REASON_FAILED,
        detail="why",
    )
    assert wire.delta(message) == TokenDelta(
        "r",
        1,
        3,
        5,
        (1, 3),
        (-1.0, -3.0),
        (((1, -1.0), (2, -2.0)), ((3, -3.0), (4, -4.0))),
        FinishReason.FAILED,
        "why",
    )
    del message.top_logprobs[0]
    with pytest.raises(MalformedMessage, match="2 tokens and 3 top_logprobs"):
        wire.delta(message)

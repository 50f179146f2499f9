"""A gateway's gRPC face on a real port of this host, an echo engine behind it, and channels to it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
from expertmesh.v1 import admin_pb2_grpc, control_pb2, inference_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

from gateway.admin_service import AdminService
from gateway.grpc_server import GrpcServer
from gateway.model_card import ModelCard
from gateway.state import GatewayState
from tests.unit.gateway_world import EchoEngine, state_of


@dataclass
class Face:
    """`placement` is what the controller would answer."""

    state: GatewayState
    engine: EchoEngine
    server: GrpcServer
    channel: grpc.aio.Channel
    placement: control_pb2.PlacementTable | None = None

    def __post_init__(self) -> None:
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def is_idle(self) -> bool:
        """Nothing open in the gateway, nothing running in the engine."""
        return self.state.ledger.num_open == 0 and self.engine.num_running == 0


@asynccontextmanager
async def facing(card: ModelCard, **limits: Any) -> AsyncIterator[Face]:
    state, engine = state_of(card, **limits)

    async def placed() -> control_pb2.PlacementTable | None:
        return face.placement

    server = GrpcServer("127.0.0.1", 0, state, AdminService(state, placed))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            face = Face(state, engine, server, channel)
            yield face
    finally:
        engine.go_on.set()
        engine.accepts.set()
        await server.stop(0)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """What a call, or the reading of one message, ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def end_of(stream: Any) -> grpc.StatusCode:
    """The status of a stream, once all of it has been read."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await stream.read() is not grpc.aio.EOF:
            continue
    code: grpc.StatusCode = await stream.code()
    return code


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of a status, by name; every one of ours has an ErrorInfo of this domain."""
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found: dict[str, Any] = {}
    for packed in status.details:
        for kind in kinds:
            if packed.Is(kind.DESCRIPTOR):
                found[kind.DESCRIPTOR.name] = detail = kind()
                packed.Unpack(detail)
    assert len(found) == len(status.details)
    assert found["ErrorInfo"].domain == "expertmesh"
    return found

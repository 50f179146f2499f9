"""A gateway's links over real gRPC, its ledger, and a scheduler at the other end that says what a test wants."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from expertmesh.v1 import identity_pb2, schedule_pb2, schedule_pb2_grpc

from gateway import wire
from gateway.config import GatewayConfig
from gateway.ledger import Ledger
from gateway.link import SchedulerLink
from gateway.metrics import GatewayMetrics
from gateway.request import GenerateRequest, Sampling
from gateway.token_service import TokenService
from tests.unit.gateway_world import until

TOKEN = "link-secret"
FINGERPRINT = "f00d"
Message = schedule_pb2.GatewayMessage
Order = schedule_pb2.GatewayOrder


class ScriptedScheduler(schedule_pb2_grpc.SchedulerServiceServicer):
    """Welcomes every gateway, records what it says, and answers submissions as `answer` says."""

    def __init__(self, address: str, term: int = 1) -> None:
        self.address = address
        self.term = term
        self.fingerprint = FINGERPRINT
        self.model_len_max = 128
        self.welcomes = True
        self.heard: list[Message] = []
        self.metadata: list[dict[str, Any]] = []
        self.answer: Callable[[schedule_pb2.Submit], Order | None] = self.accept
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._server = grpc.aio.server()
        schedule_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(address)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    def accept(self, submit: schedule_pb2.Submit) -> Order:
        return Order(accepted=schedule_pb2.Accepted(request_id=submit.request_id, queued_before=3))

    def say(self, order: Order) -> None:
        """Send an order on the stream; term and checkpoint are filled in where it has none."""
        self._orders.put_nowait(order)

    def submits(self) -> list[schedule_pb2.Submit]:
        return [message.submit for message in self.heard if message.HasField("submit")]

    async def Gateway(self, requests: AsyncIterator[Message], context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self._orders = asyncio.Queue()
        if self.welcomes:
            self.say(Order(welcome=schedule_pb2.Welcome(model_len_max=self.model_len_max)))
        writing = asyncio.create_task(self._write(context))
        try:
            async for message in requests:
                self.heard.append(message)
                if message.HasField("submit") and (order := self.answer(message.submit)):
                    self.say(order)
        finally:
            writing.cancel()

    async def _write(self, context: Any) -> None:
        while True:
            order = await self._orders.get()
            order.term = order.term or self.term
            order.fingerprint = order.fingerprint or self.fingerprint
            await context.write(order)


class Stage:
    """A gateway's links, its ledger, and the scheduler at the other end."""

    def __init__(self, **limits: Any) -> None:
        name = uuid.uuid4().hex
        limits = {"reconnect_s_min": 0.005, "reconnect_s_max": 0.01, **limits}
        self.scheduler = ScriptedScheduler(f"unix-abstract:em-test-{name}-s")
        self.metrics = GatewayMetrics()
        config = GatewayConfig(**limits)
        self.identity = identity = wire.Identity("gateway-0", 4, FINGERPRINT, f"unix-abstract:em-test-{name}-t")
        self.link = SchedulerLink(self.scheduler.address, identity, TOKEN, config, self.metrics)
        self.ledger = Ledger(self.link, config, self.metrics)
        self.tokens = TokenService(identity, TOKEN, self.ledger, config, self.metrics)

    async def restart(self, **changes: Any) -> None:
        """The scheduler dies; a new one with the next term takes its address."""
        await self.scheduler.stop()
        await until(lambda: bool(self.link.not_ready))
        self.scheduler = ScriptedScheduler(self.scheduler.address, self.scheduler.term + 1)
        vars(self.scheduler).update(changes)
        await self.scheduler.start()


@asynccontextmanager
async def staged(**limits: Any) -> AsyncIterator[Stage]:
    stage = Stage(**limits)
    await stage.scheduler.start()
    stage.link.start(stage.ledger)
    await until(lambda: not stage.link.not_ready)
    try:
        yield stage
    finally:
        await stage.link.stop()
        await stage.tokens.stop()
        await stage.scheduler.stop()


def ask(name: str = "r", n: int = 1) -> GenerateRequest:
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=40, seed=2**64 - 1)
    return GenerateRequest(name, (1, 2, 3), sampling, 9, n=n, stop_token_ids=frozenset({7, 5}), num_logprobs=0)


def attempt(number: int = 1, index: int = 0, name: str = "r") -> identity_pb2.Attempt:
    return identity_pb2.Attempt(request_id=name, index=index, number=number)

"""Raw clients of the scheduler's link: a gateway and a worker over real streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from expertmesh.v1 import identity_pb2, schedule_pb2, schedule_pb2_grpc, step_pb2

from cluster.auth import auth_metadata
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.events import MembersExpected
from cluster.scheduler.server import SchedulerServer
from tests import one_loop

MODEL = "model-a"
TOKEN = "secret"
ADDRESSES = (f"unix-abstract:em-scheduler-{os.getpid()}-{n}" for n in itertools.count())
W0 = identity_pb2.Incarnation(id="attention-0", number=1)
G0 = identity_pb2.Incarnation(id="gateway-0", number=1)


class Stream:
    """A raw client's stream. Every wait has a bound."""

    def __init__(self, call: Any, sender: identity_pb2.Incarnation, message: type) -> None:
        self.call, self.sender, self.message = call, sender, message
        self.term = 0

    async def say(self, **body: Any) -> None:
        body = {"sender": self.sender, "fingerprint": MODEL, "term": self.term} | body
        await asyncio.wait_for(self.call.write(self.message(**body)), 5)

    async def hear(self) -> Any:
        order = await asyncio.wait_for(self.call.read(), 5)
        assert order is not grpc.aio.EOF, await self.call.code()
        return order

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the server ended it, once everything said before is read."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with asyncio.timeout(5):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        code = await asyncio.wait_for(self.call.code(), 5)
        return code, await self.call.details()


class Client:
    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = schedule_pb2_grpc.SchedulerServiceStub(self.channel)
        self.metadata = auth_metadata(token)

    def gateway(self, sender: identity_pb2.Incarnation = G0) -> Stream:
        return Stream(self.stub.Gateway(metadata=self.metadata), sender, schedule_pb2.GatewayMessage)

    def worker(self, sender: identity_pb2.Incarnation = W0) -> Stream:
        return Stream(self.stub.Worker(metadata=self.metadata), sender, step_pb2.WorkerReport)


@asynccontextmanager
async def cluster(**config: Any) -> AsyncIterator[tuple[SchedulerServer, Client]]:
    server = SchedulerServer(Scheduler(SchedulerConfig(**config), 3, MODEL), TOKEN)
    client = Client(await server.start(next(ADDRESSES)))
    server.post(MembersExpected(frozenset()))
    try:
        yield server, client
    finally:
        await client.channel.close()
        await server.stop()


def run(story: Callable[[], Awaitable[None]]) -> None:
    one_loop.run(asyncio.wait_for(story(), 20))


def hello_worker() -> dict[str, Any]:
    limits = step_pb2.WorkerHello(block_tokens=16, blocks_total=64, sequences_max=32, model_len_max=512)
    return {"hello": limits, "state": step_pb2.State(), "blocks_free": 64}


def submit(request_id: str = "r1", num_prompt: int = 20, **changed: Any) -> schedule_pb2.Submit:
    sampling = step_pb2.Sampling(temperature=0.5, seed=1)
    fields = {
        "request_id": request_id,
        "prompt": range(num_prompt),
        "spec": step_pb2.SequenceSpec(sampling=sampling, stop_token_ids=[2], max_tokens=9, num_logprobs=0),
        "siblings": [schedule_pb2.Sibling(index=0, attempt=1, seed=77, accepted=[5, 6])],
    }
    return schedule_pb2.Submit(**{**fields, **changed})


async def joined_gateway(client: Client) -> Stream:
    gateway = client.gateway()
    await gateway.say(hello=schedule_pb2.GatewayHello(token_address="unix:tokens"))
    await gateway.hear()
    return gateway


async def joined_worker(client: Client) -> Stream:
    """Has answered its first plan."""
    worker = client.worker()
    await worker.say(**hello_worker())
    plan = await worker.hear()
    assert (plan.number, plan.send_state) == (1, True)
    worker.term = plan.term
    await worker.say(plan_number=1, blocks_free=64, state=step_pb2.State())
    return worker


async def until(holds: Callable[[], bool]) -> None:
    """Turns come at most a tick apart."""
    async with asyncio.timeout(5):
        while not _true(holds):
            await asyncio.sleep(0.005)


def _true(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except KeyError:  # a counter that has not counted yet
        return False

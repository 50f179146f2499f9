"""A real attention worker and real expert workers in this process, over shm and gRPC, and who they talk to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc.aio
from expertmesh.v1 import identity_pb2, schedule_pb2_grpc, step_pb2, step_pb2_grpc

from attention_workers.config import AttentionConfig
from attention_workers.service import AttentionService
from expert_workers.config import ExpertConfig
from expert_workers.service import ExpertService
from router.config import RouterConfig
from router.membership import Prepared
from router.placement import EpochId, Member, spread

PATIENCE_S = 20
TOKEN = "secret"


class Scheduler(schedule_pb2_grpc.SchedulerServiceServicer):
    """Its orders and the worker's reports, as queues."""

    def __init__(self):
        self.reports: asyncio.Queue = asyncio.Queue()
        self.plans: asyncio.Queue = asyncio.Queue()

    async def Worker(self, request_iterator, _context):
        async def take():
            async for report in request_iterator:
                self.reports.put_nowait(report)

        task = asyncio.ensure_future(take())
        while (plan := await self.plans.get()) is not None:
            yield plan
        task.cancel()


class Gateway(step_pb2_grpc.TokenServiceServicer):
    """Acknowledges all, and keeps each attempt's tokens and last word."""

    def __init__(self):
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: asyncio.Queue = asyncio.Queue()
        self.takes = asyncio.Event()  # acknowledges
        self.takes.set()

    async def Deliver(self, request_iterator, _context):
        async for batch in request_iterator:
            for delta in batch.deltas:
                name = delta.attempt.request_id, delta.attempt.number
                self.tokens.setdefault(name, []).extend(delta.tokens)
                if delta.finish:
                    self.ends.put_nowait((name, step_pb2.FinishReason.Name(delta.finish)))
            await self.takes.wait()
            yield step_pb2.TokenAck(number=batch.number)


class World:
    """`async with World(checkpoint, experts_wait_s=0.2) as world`"""

    def __init__(self, checkpoint, **config):
        self.checkpoint = checkpoint
        self.scheduler, self.gateway = Scheduler(), Gateway()
        self._at = f"unix-abstract:expertmesh-test-service-{id(self)}"
        self._config = AttentionConfig(kv_bytes=1 << 20, **config)
        self._plans = self._epochs = 0
        self._handles: dict[int, tuple[str, int]] = {}  # request id and attempt of what was started
        self._experts: list[ExpertService] = []
        self.loop = asyncio.get_running_loop()

    async def __aenter__(self):
        self._servers = [
            await self._serve(
                schedule_pb2_grpc.add_SchedulerServiceServicer_to_server, self.scheduler, "scheduler"
            ),
            await self._serve(step_pb2_grpc.add_TokenServiceServicer_to_server, self.gateway, "gateway"),
        ]
        self.attention = AttentionService(
            self.checkpoint.path, Member("attention-0", 1), TOKEN, self._config, RouterConfig(), "shm", "cpu", 1.0,
            f"{self._at}-scheduler", lambda _event: None,
        )  # fmt: skip
        self.attention.start()
        return self

    async def _serve(self, add, servicer, name):
        server = grpc.aio.server()
        add(servicer, server)
        server.add_insecure_port(f"{self._at}-{name}")
        await server.start()
        return server

    async def __aexit__(self, *_):
        await asyncio.to_thread(self.attention.stop, PATIENCE_S)
        for expert in self._experts:
            await asyncio.to_thread(expert.stop, PATIENCE_S)
        for server in self._servers:
            await server.stop(0)

    async def new_experts(self):
        """One expert worker, the next life of its id, that holds every expert; published to the worker."""
        self._epochs += 1
        prepared, config = asyncio.Event(), self.checkpoint.config

        def happened(event):
            if isinstance(event, Prepared):
                self.loop.call_soon_threadsafe(prepared.set)

        expert = ExpertService(
            self.checkpoint.path, Member("expert-0", self._epochs), TOKEN, ExpertConfig(), RouterConfig(), "shm",
            "127.0.0.1", "cpu", 1.0, happened,
        )  # fmt: skip
        expert.start()
        self._experts.append(expert)
        placement = spread(
            EpochId(1, self._epochs), self.checkpoint.fingerprint, [(expert.member, expert.address)],
            config.num_layers, config.num_experts, 1,
        )  # fmt: skip
        expert.prepare(placement)
        await prepared.wait()
        self.attention.publish(placement)

    async def lose_experts(self):
        """The last of them is gone, its links with it."""
        await asyncio.to_thread(self._experts.pop().stop, PATIENCE_S)

    def plan(self, **said):
        """The next, which begins nothing yet."""
        self._plans += 1
        return step_pb2.Plan(
            term=1, number=self._plans, to=identity_pb2.Incarnation(id="attention-0", number=1),
            fingerprint=self.checkpoint.fingerprint, step_tokens_max=64, chunk_tokens_max=64, **said,
        )  # fmt: skip

    def order(self, request_id, number, max_tokens=6, **said):
        """A plan that starts this attempt."""
        plan = self.plan(**said)
        spec = step_pb2.SequenceSpec(max_tokens=max_tokens)
        self._handles[self._plans] = (request_id, number)
        plan.starts.add(
            handle=self._plans, attempt=identity_pb2.Attempt(request_id=request_id, number=number),
            prompt=[3, 1, 4, 1, 5], spec=spec, gateway_address=f"{self._at}-gateway",
        )  # fmt: skip
        self.scheduler.plans.put_nowait(plan)

    async def report(self, is_wanted):
        """The next report that is as wanted."""
        while not is_wanted(report := await self.scheduler.reports.get()):
            pass
        return SimpleNamespace(
            experts_missing=report.experts_missing,
            completions=[
                (*self._handles[handle], step_pb2.FinishReason.Name(reason))
                for handle, reason in zip(report.endings.handles, report.endings.reasons, strict=True)
            ],
        )

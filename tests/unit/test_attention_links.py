"""Promises of the worker's streams: completed means delivered, and a broken stream loses no sequence."""

import asyncio
import itertools
import threading

import grpc.aio
import pytest
from expertmesh.v1 import schedule_pb2_grpc, step_pb2, step_pb2_grpc

from attention_workers.deliveries import Batch
from attention_workers.links import SchedulerLink, TokenLinks
from attention_workers.step import AttemptId, Completion, FinishReason, Plan, TokenDelta
from attention_workers.streams import AttemptsRefused, Greeted, Snapshot, Streams, still_said
from router.placement import Member
from tests.one_loop import run

ME = Member("a0", 1)
ATTEMPT = AttemptId("r", 0, 1)
_names = itertools.count()


def delta(position, finish=None):
    return TokenDelta(ATTEMPT, position, (position + 10,), finish=finish)


DONE = Completion(ATTEMPT, FinishReason.STOP, 2)


class Gateway(step_pb2_grpc.TokenServiceServicer):
    """Takes batches; acknowledges when told to, refuses what it is told to, hangs up when told to."""

    def __init__(self):
        self.taken = asyncio.Queue()
        self.acks = asyncio.Queue()

    async def Deliver(self, request_iterator, context):
        assert dict(context.invocation_metadata())["authorization"] == "Bearer secret"

        async def take():
            async for batch in request_iterator:
                self.taken.put_nowait(batch)

        task = asyncio.ensure_future(take())
        while (ack := await self.acks.get()) is not None:
            yield ack
        task.cancel()


async def serve(add, servicer):
    server = grpc.aio.server()
    address = f"unix-abstract:expertmesh-test-links-{id(servicer)}-{next(_names)}"
    add(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    return server, address


async def with_gateway(story):
    gateway, heard = Gateway(), asyncio.Queue()
    server, address = await serve(step_pb2_grpc.add_TokenServiceServicer_to_server, gateway)
    links = TokenLinks(
        ME, "fp", "secret", 4,
        on_completed=lambda c: heard.put_nowait(("completed", c)),
        on_refused=lambda a: heard.put_nowait(("refused", a)),
        on_broken=lambda a, u: heard.put_nowait(("broken", a, u)),
    )  # fmt: skip
    try:
        await asyncio.wait_for(story(gateway, links, address, heard), 20)
    finally:
        await links.close()
        await server.stop(0)


def test_a_completion_is_reported_once_its_batch_is_taken():
    async def story(gateway, links, address, heard):
        links.send(address, Batch([delta(0)], []))
        links.send(address, Batch([delta(1, FinishReason.STOP)], [DONE]))
        batches = [await gateway.taken.get() for _ in range(2)]
        assert [b.number for b in batches] == [1, 2]
        assert [d.finish for b in batches for d in b.deltas] == [0, step_pb2.FINISH_REASON_STOP]
        gateway.acks.put_nowait(step_pb2.TokenAck(number=1))
        gateway.acks.put_nowait(step_pb2.TokenAck(number=2))
        assert await heard.get() == ("completed", [DONE])

    run(with_gateway(story))


def test_a_broken_stream_names_what_may_not_have_arrived():
    async def story(gateway, links, address, heard):
        links.send(address, Batch([delta(1, FinishReason.STOP)], [DONE]))
        await gateway.taken.get()
        gateway.acks.put_nowait(None)
        assert await heard.get() == ("broken", address, [ATTEMPT])
        links.send(address, Batch([delta(0)], []))  # a gateway that is back gets a new stream, numbered anew
        assert (await gateway.taken.get()).number == 1

    run(with_gateway(story))


def test_a_gateway_that_falls_behind_is_given_its_sequences_back():
    """The backlog is bounded: beyond it the stream is cut, not the worker's memory filled."""

    async def story(gateway, links, address, heard):
        for position in range(6):
            links.send(address, Batch([delta(position)], [DONE] if position == 4 else []))
        assert await heard.get() == ("broken", address, [ATTEMPT])

    run(with_gateway(story))


def test_refused_attempts_are_passed_on():
    async def story(gateway, links, address, heard):
        links.send(address, Batch([delta(0)], []))
        ack = step_pb2.TokenAck(number=1)
        ack.refused.add(request_id="r", index=0, number=1)
        gateway.acks.put_nowait(ack)
        assert await heard.get() == ("refused", [ATTEMPT])

    run(with_gateway(story))


class Scheduler(schedule_pb2_grpc.SchedulerServiceServicer):
    def __init__(self):
        self.reports = asyncio.Queue()
        self.plans = asyncio.Queue()

    async def Worker(self, request_iterator, context):
        async def take():
            async for report in request_iterator:
                self.reports.put_nowait(report)

        task = asyncio.ensure_future(take())
        while (plan := await self.plans.get()) is not None:
            yield plan
        task.cancel()


def test_a_hello_is_of_one_moment():
    """While the compute thread goes on: a plan said to be applied is never without what it started."""
    streams = Streams(ME, "secret", "unix-abstract:nobody", 4, lambda item: None, lambda why: None)
    streams._hello = step_pb2.WorkerHello(block_tokens=16)
    moments = [
        Snapshot(step_pb2.WorkerReport(plan_number=n), step_pb2.State(running=[step_pb2.RunningSequence()] * n))
        for n in range(50)
    ]
    streams.latest = moments[0]
    is_over = threading.Event()

    def go_on():
        for moment in itertools.cycle(moments):
            streams.latest = moment
            if is_over.is_set():
                return

    compute = threading.Thread(target=go_on)
    compute.start()
    hellos = [streams._greet()]
    while len(hellos) < 2000 or hellos[-1].plan_number == hellos[0].plan_number:  # the threads do take turns
        hellos.append(streams._greet())
    is_over.set()
    compute.join()
    streams.close(1.0)
    assert all(len(hello.state.running) == hello.plan_number for hello in hellos)


def test_every_stream_to_the_scheduler_begins_with_the_whole_state():
    """A scheduler that restarts, or a stream that broke, learns all from the hello."""

    async def story():
        scheduler = Scheduler()
        server, address = await serve(schedule_pb2_grpc.add_SchedulerServiceServicer_to_server, scheduler)
        hellos, plans = itertools.count(1), asyncio.Queue()
        link = SchedulerLink(
            address, "secret", plans.put_nowait, lambda: step_pb2.WorkerReport(steps=next(hellos)), 8
        )
        task = asyncio.ensure_future(link.run())
        assert (await scheduler.reports.get()).steps == 1
        scheduler.plans.put_nowait(step_pb2.Plan(term=3, number=1))
        assert (await plans.get()).term == 3
        link.report(step_pb2.WorkerReport(steps=77))
        assert (await scheduler.reports.get()).steps == 77
        scheduler.plans.put_nowait(None)
        assert (await scheduler.reports.get()).steps == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.stop(0)

    run(asyncio.wait_for(story(), 20))


def test_plans_of_a_stream_that_has_ended_are_void_when_the_next_hello_did_not_tell_of_them():
    """Their scheduler gives again what they said, under their numbers: else the worker is ahead for ever."""
    first, second, third = [Plan(1, number, "fp", 1) for number in (1, 2, 3)]
    refused = AttemptsRefused([ATTEMPT])
    assert still_said([first, refused, Greeted(), second, third]) == [refused, Greeted(), second, third]
    assert still_said([first, second]) == [first, second]

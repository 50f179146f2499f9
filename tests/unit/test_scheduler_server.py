"""The scheduler's link over real streams: a gateway and a worker as raw clients."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from expertmesh.v1 import identity_pb2, schedule_pb2, step_pb2

from cluster.auth import TokenInterceptor, auth_metadata
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.errors import AddressUnusable
from cluster.scheduler.events import CloseReason, FinishReason, Incarnation, MembersExpected, RejectCode
from cluster.scheduler.server import Link, SchedulerServer
from tests.unit.scheduler_streams import (
    MODEL,
    TOKEN,
    W0,
    cluster,
    joined_gateway,
    joined_worker,
    run,
    submit,
    until,
)


def test_a_request_goes_from_gateway_to_worker_and_its_end_frees_it() -> None:
    """Submit, Accepted, Plan, Completion: every field arrives, each sibling with its own seed."""

    async def story() -> None:
        async with cluster() as (server, client):
            gateway, worker = await joined_gateway(client), await joined_worker(client)
            assert (await gateway.hear()).welcome.model_len_max == 512
            await gateway.say(submit=submit(priority=-2, resume=True))
            accepted = await gateway.hear()
            assert (accepted.term, accepted.fingerprint) == (3, MODEL)
            assert accepted.accepted == schedule_pb2.Accepted(request_id="r1", queued_before=0)
            plan = await worker.hear()
            assert (plan.number, plan.to, plan.term, plan.fingerprint) == (2, W0, 3, MODEL)
            assert (plan.step_tokens_max, plan.chunk_tokens_max) == (512, 256)
            (start,) = plan.starts
            assert start.attempt == identity_pb2.Attempt(request_id="r1", index=0, number=1)
            assert (list(start.prompt), list(start.accepted)) == (list(range(20)), [5, 6])
            spec = submit().spec
            spec.sampling.seed = 77
            assert start.spec == spec
            assert (start.priority, start.gateway_address) == (-2, "unix:tokens")
            stop = step_pb2.FINISH_REASON_STOP
            done = step_pb2.Endings(handles=[start.handle], reasons=[stop], num_tokens=[3])
            await worker.say(plan_number=2, blocks_free=64, endings=done)
            await until(lambda: server.snapshot()["ended_finished_total"] == 1)
            assert server.snapshot()["running"] == 0

    run(story)


def test_a_worker_that_dies_is_noticed_and_its_attempt_closed() -> None:
    """The end of its stream is enough."""

    async def story() -> None:
        async with cluster(worker_deadline_s=0.0) as (_, client):
            gateway, worker = await joined_gateway(client), await joined_worker(client)
            await gateway.hear()
            await gateway.say(submit=submit())
            await gateway.hear()
            await worker.hear()
            worker.call.cancel()
            closed = (await gateway.hear()).closed
            assert closed.reason == schedule_pb2.CLOSE_REASON_WORKER_LOST
            assert closed.attempt.request_id == "r1"
            assert "attention-0#1" in closed.detail

    run(story)


def test_the_controllers_word_that_a_worker_drains_reaches_it() -> None:
    async def story() -> None:
        async with cluster() as (server, client):
            worker = await joined_worker(client)
            member = Incarnation(W0.id, W0.number)
            server.post(MembersExpected(frozenset({member}), frozenset({member})))
            plan = await worker.hear()
            assert (plan.number, plan.draining) == (2, True)

    run(story)


def test_a_refusal_and_a_cancel_travel() -> None:
    async def story() -> None:
        async with cluster() as (_, client):
            gateway, worker = await joined_gateway(client), await joined_worker(client)
            await gateway.hear()
            await gateway.say(submit=submit(num_prompt=600))
            rejected = (await gateway.hear()).rejected
            assert (rejected.request_id, rejected.code) == ("r1", schedule_pb2.REJECT_CODE_TOO_LARGE)
            assert "at most 512" in rejected.message
            await gateway.say(submit=submit())
            await gateway.hear()
            await worker.hear()
            await gateway.say(cancel=schedule_pb2.Cancel(request_id="r1"))
            assert [stop.request_id for stop in (await worker.hear()).stops] == ["r1"]

    run(story)


def test_a_stream_without_the_token_is_refused_before_it_is_read() -> None:
    """The client need not even have spoken."""

    async def story() -> None:
        async with cluster() as (server, client):
            for metadata in ((), auth_metadata("secreT"), (("authorization", TOKEN),)):
                for stub in (client.stub.Gateway, client.stub.Worker):
                    call = stub(metadata=metadata)
                    assert await asyncio.wait_for(call.code(), 5) == grpc.StatusCode.UNAUTHENTICATED
            assert server.snapshot()["gateways"] == 0

    run(story)
    with pytest.raises(ValueError, match="token is empty"):
        TokenInterceptor("")


GARBAGE = {
    "no hello first": {"submit": submit()},
    "no sender": {"sender": identity_pb2.Incarnation(), "hello": {"token_address": "unix:t"}},
    "no address": {"hello": {}},
    "nothing": {},
    "an id too long": {"sender": {"id": "g" * 300, "number": 1}, "hello": {"token_address": "unix:t"}},
}


@pytest.mark.parametrize("first", GARBAGE.values(), ids=GARBAGE)
def test_a_stream_that_begins_wrongly_is_ended_and_leaves_nothing(first: dict[str, Any]) -> None:
    async def story() -> None:
        async with cluster() as (server, client):
            gateway = client.gateway()
            await gateway.say(**first)
            code, why = await gateway.refusal()
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert "accepted" in why or "hello" in why
            assert server.snapshot()["gateways"] == 0
            await joined_gateway(client)  # others are served

    run(story)


SECOND = {
    "prompt length is 0": {"submit": submit(num_prompt=0)},
    "max_tokens is 0": {"submit": submit(spec=step_pb2.SequenceSpec())},
    "siblings length is 0": {"submit": submit(siblings=[])},
    "an index occurs twice": {"submit": submit(siblings=[schedule_pb2.Sibling(attempt=1)] * 2)},
    "siblings.attempt is 0": {"submit": submit(siblings=[schedule_pb2.Sibling()])},
    "accepted length is 9": {"submit": submit(siblings=[schedule_pb2.Sibling(attempt=1, accepted=range(9))])},
    "siblings length is 129": {
        "submit": submit(siblings=[schedule_pb2.Sibling(index=i, attempt=1) for i in range(129)])
    },
    "submit size in bytes": {"submit": submit(num_prompt=3000)},
    "request_id": {"submit": submit(request_id="")},
    "sender is attention-0#1": {"sender": W0, "cancel": {"request_id": "x"}},
    "only the first": {"hello": {"token_address": "unix:t"}},
    "body is empty": {},
}


@pytest.mark.parametrize(("why", "said"), SECOND.items(), ids=SECOND)
def test_a_malformed_message_ends_the_stream_naming_the_field(why: str, said: dict[str, Any]) -> None:
    """Refused at the wire: the core never sees it."""

    async def story() -> None:
        async with cluster(message_bytes_max=6000) as (server, client):
            gateway = await joined_gateway(client)
            await gateway.say(**said)
            code, details = await gateway.refusal()
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert why in details
            assert server.counters["refused_messages"] == 1

    run(story)


def test_bytes_that_are_no_message_or_too_many_end_the_stream() -> None:
    """Sizes are checked before anything is decoded."""

    async def story() -> None:
        async with cluster(message_bytes_max=5000) as (_, client):
            method = client.channel.stream_stream("/expertmesh.v1.SchedulerService/Worker")
            for data, expected in (
                (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
                (b"\x00" * 6000, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                call = method(metadata=client.metadata)
                await call.write(data)
                assert await asyncio.wait_for(call.code(), 5) == expected
            await joined_worker(client)

    run(story)


def test_joining_again_takes_the_place_of_the_old_stream() -> None:
    """Without being taken for a loss."""

    async def story() -> None:
        async with cluster(gateway_lease_s=0.0) as (server, client):
            old = await joined_gateway(client)
            await old.say(submit=submit(resume=True))
            await old.hear()
            new = await joined_gateway(client)
            assert (await old.refusal())[0] == grpc.StatusCode.ABORTED
            await new.say(submit=submit(resume=True))
            assert (await new.hear()).accepted.request_id == "r1"
            assert server.snapshot()["waiting"] == 1

    run(story)


def test_a_peer_whose_orders_pile_up_has_its_stream_closed() -> None:
    """Orders to one peer are bounded; it says what it holds when it joins again."""

    async def story() -> None:
        bounds = {"link_inbox_max": 4, "link_outbox_max": 8, "worker_deadline_s": 0.0}
        async with cluster(**bounds) as (server, client):
            gateway, worker = await joined_gateway(client), await joined_worker(client)
            await gateway.hear()
            siblings = [schedule_pb2.Sibling(index=i, attempt=1) for i in range(16)]
            await gateway.say(submit=submit(num_prompt=1, siblings=siblings))
            await gateway.hear()
            await worker.hear()
            worker.call.cancel()  # 16 attempts close at once
            code, why = await gateway.refusal()
            assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "8 orders not taken (link_outbox_max)")
            assert server.counters["links_closed_full"] == 1
            await joined_gateway(client)

    run(story)


def test_a_peer_is_not_read_while_it_does_not_take_its_orders() -> None:
    """It is slowed down before it is cut off, however much it says."""

    async def story() -> None:
        link = Link(Incarnation("gateway-0", 1), inbox_max=2, outbox_max=8)
        for _ in range(3):
            link.give(schedule_pb2.GatewayOrder())
        reading = asyncio.create_task(link.may_read())
        await asyncio.sleep(0)
        assert not reading.done()
        await link.take()
        await asyncio.wait_for(reading, 5)
        await asyncio.wait_for(link.may_read(), 5)
        full = asyncio.create_task(link.may_read())
        await asyncio.sleep(0)
        assert not full.done()
        link.room.release()
        await asyncio.wait_for(full, 5)

    run(story)


def test_a_newer_term_ends_this_scheduler() -> None:
    """Two schedulers cannot both order."""

    async def story() -> None:
        async with cluster() as (server, client):
            gateway, worker = await joined_gateway(client), await joined_worker(client)
            worker.term = 4
            await worker.say(plan_number=0, blocks_free=64)
            assert await asyncio.wait_for(server.wait(), 5) == 4
            late = client.gateway(identity_pb2.Incarnation(id="gateway-1", number=1))
            await late.say(hello=schedule_pb2.GatewayHello(token_address="unix:t"))
            for stream in (gateway, worker, late):
                assert (await stream.refusal())[0] == grpc.StatusCode.FAILED_PRECONDITION

    run(story)


def test_a_scheduler_that_fails_ends_every_stream() -> None:
    """A decider in doubt decides nothing more; a new term starts from what its peers say."""

    async def story() -> None:
        async with cluster() as (server, client):
            gateway = await joined_gateway(client)
            server.post("not an event")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="not an event"):
                await asyncio.wait_for(server.wait(), 5)
            assert (await gateway.refusal())[0] == grpc.StatusCode.INTERNAL

    run(story)


def test_an_address_in_use_is_an_error() -> None:
    """Never shared silently with another server."""

    async def story() -> None:
        scheduler = Scheduler(SchedulerConfig(), 1, MODEL)
        first, second = SchedulerServer(scheduler, TOKEN), SchedulerServer(scheduler, TOKEN)
        address = await first.start("127.0.0.1:0")
        assert not address.endswith(":0")
        with pytest.raises(AddressUnusable, match="cannot be bound"):
            await second.start(address)
        await second.stop()
        await first.stop()

    run(story)


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (FinishReason, step_pb2.FinishReason, "FINISH_REASON_"),
        (RejectCode, schedule_pb2.RejectCode, "REJECT_CODE_"),
        (CloseReason, schedule_pb2.CloseReason, "CLOSE_REASON_"),
    ],
)
def test_enumerations_have_the_wires_names_and_values(ours: Any, theirs: Any, prefix: str) -> None:
    known = {f"{prefix}{one.name}": one.value for one in ours}
    assert known | {f"{prefix}UNSPECIFIED": 0} == dict(theirs.items())

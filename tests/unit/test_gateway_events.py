"""What watchers of the cluster are told, over REST and gRPC: everything that changed, once, while any watch."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import httpx
import pytest
from expertmesh.v1 import admin_pb2 as pb

from cluster.events import WORKER_ROLES
from cluster.overview import overview
from gateway.cluster_events import ClusterWatch, changes
from gateway.config import GatewayConfig
from gateway.errors import NotReady, Overloaded
from gateway.model_card import ModelCard
from tests.unit.controller_world import TWO_BY_THREE, World
from tests.unit.gateway_world import card_of, serving, until, write_checkpoint
from tests.unit.grpc_world import Face, facing, failure

FAST = {"watch_s": 0.05}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def document(**other: Any) -> dict[str, Any]:
    """Of a cluster with one worker."""
    worker = {
        "id": "expert-0", "role": "expert", "pid": 4, "node": "n", "device": "cpu", "state": "ready", "detail": "",
        "incarnation": 1, "bytes_loaded": 5, "bytes_total": 5, "bytes_kept": 5, "kept_as": "float32", "slots": 2,
        "epoch": None, "silent_s": random.random(), "gauges": {"busy": random.random()},
    }  # fmt: skip
    whole = {
        "model": "tiny", "fingerprint": "f00d", "phase": "ready", "term": 1, "epoch": {"term": 1, "number": 1},
        "uptime_s": random.random(), "pools": {"expert": {"wanted": 1, "ready": 1, "leaving": 0}},
        "workers": [worker | other.pop("worker", {})], "failures": [], "scaling_failed": "",
    }  # fmt: skip
    return whole | other


def news_of(document: dict[str, Any]) -> dict[str, Any]:
    """What of a document is news."""
    names = ("phase", "epoch", "scaling_failed")
    (told,) = changes(None, document)
    whole = told["status"]
    workers = {}
    for event in changes(whole | {"workers": []}, whole):
        if event["type"] == "worker":
            workers[event["worker"]["id"]] = event["worker"]
    return {name: whole[name] for name in names} | {"workers": workers}


def applied(known: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    match event["type"]:
        case "status":
            return news_of(event["status"])
        case "worker":
            return known | {"workers": known["workers"] | {event["worker"]["id"]: event["worker"]}}
        case "worker_left":
            return known | {"workers": {k: v for k, v in known["workers"].items() if k != event["worker"]}}
        case "phase" | "epoch":
            return known | {event["type"]: event[event["type"]]}
        case "scaling_failed":
            return known | {"scaling_failed": event["reason"]}
    return known


@pytest.mark.parametrize("seed", range(5))
def test_who_applies_the_events_knows_the_cluster(seed: int) -> None:
    """A real controller under faults: every difference is told, no failure is left out, and none is told twice."""
    world, chance = World(TWO_BY_THREE, seed), random.Random(seed)
    known: dict[str, Any] = {}
    last: dict[str, Any] | None = None
    failures: list[tuple[int, int]] = []
    for _ in range(40):
        world.run(chance.random() * 3)
        workers = [p.member for p in world.processes.values() if p.is_alive and p.role in WORKER_ROLES]
        if workers and chance.random() < 0.3:
            world.kill(chance.choice(workers))
        now = overview(world.controller, {"model": "tiny"}, world.now_s)
        for event in changes(last, now):
            known = applied(known, event)
            new = event["status"]["failures"] if event["type"] == "status" else [event.get("failure")]
            failures += [(now["term"], failure["number"]) for failure in new if failure]
        assert known == news_of(now)
        last = now
    assert last is not None
    assert failures == sorted(set(failures))
    assert {(last["term"], failure["number"]) for failure in last["failures"]} <= set(failures)
    assert len(failures) > 3


def test_what_changes_all_the_time_is_no_news() -> None:
    assert not list(changes(document(), document()))


class Cluster:
    """A controller whose answer a test sets."""

    def __init__(self) -> None:
        self.says: dict[str, Any] | Exception = document()
        self.num_asked = 0

    async def status(self) -> dict[str, Any]:
        self.num_asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


async def test_nobody_is_asked_unless_somebody_watches() -> None:
    """And once for all who do; the last to go ends it."""
    cluster = Cluster()
    watch = ClusterWatch(GatewayConfig(watch_s=0.05, watchers_max=2), cluster.status)
    async with aclosing(watch.events()) as one, aclosing(watch.events()) as other:
        assert (await anext(one))["type"] == (await anext(other))["type"] == "status"
        assert cluster.num_asked == 1
        with pytest.raises(Overloaded, match="2 watch already; accepted: at most 2"):
            watch.events()
        cluster.says = document(phase="draining")
        assert await anext(one) == await anext(other) == {"type": "phase", "phase": "draining"}
    await until(lambda: "cluster-watch" not in {task.get_name() for task in asyncio.all_tasks()})
    async with aclosing(watch.events()) as again:
        assert (await anext(again))["status"]["phase"] == "draining"


async def test_a_controller_that_is_away_is_told_once_and_then_whole() -> None:
    cluster = Cluster()
    cluster.says = NotReady("the controller cannot be reached")
    watch = ClusterWatch(GatewayConfig(watch_s=0.05), cluster.status)
    async with aclosing(watch.events()) as events:
        assert await anext(events) == {"type": "unreachable", "reason": "the controller cannot be reached"}
        cluster.says = document(term=2)
        assert (await anext(events))["status"]["term"] == 2
    cluster.says = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        await anext(watch.events())


@asynccontextmanager
async def watched(face: Face) -> AsyncIterator[Any]:
    stream = face.admin.WatchEvents(pb.WatchEventsRequest())
    yield stream
    stream.cancel()


async def test_grpc_tells_each_kind_typed(card: ModelCard) -> None:
    cluster = Cluster()
    async with facing(card, **FAST) as face:
        face.state.status = cluster.status
        async with watched(face) as stream:
            first = await stream.read()
            assert (first.status.phase, first.status.workers[0].id) == (pb.CLUSTER_PHASE_READY, "expert-0")
            told = []
            failed = {"number": 7, "id": "expert-0", "incarnation": 1, "reason": "killed", "ago_s": 0.1}
            for says, kinds in (
                (document(phase="degraded"), ["phase"]),
                (document(worker={"state": "waiting"}, failures=[failed]), ["phase", "worker", "failure"]),
                (document(workers=[], epoch={"term": 1, "number": 2}), ["epoch", "worker", "worker_left"]),
                (NotReady("away"), ["unreachable"]),
                (document(scaling_failed="no memory"), ["status"]),
                (document(pools={"expert": {"wanted": 2, "ready": 1, "leaving": 0}}), ["pool", "scaling_failed"]),
            ):
                cluster.says = says
                while not told or told[-1].WhichOneof("event") != kinds[-1]:
                    told.append(await stream.read())
        of = {event.WhichOneof("event"): event for event in told}
        assert set(of) == {field.name for field in pb.WatchEventsResponse.DESCRIPTOR.fields}
        assert of["failure"].failure == pb.WorkerFailure(
            number=7, worker="expert-0", incarnation=1, reason="killed"
        )
        assert (of["pool"].pool.workers_wanted, of["pool"].pool.slots) == (2, 2)
        assert of["scaling_failed"].scaling_failed == ""
        assert (of["epoch"].epoch.number, of["worker_left"].worker_left) == (2, "expert-0")


async def test_a_watch_ends_with_its_deadline_or_its_client(card: ModelCard) -> None:
    """Its place is free again, and nobody is asked any more."""
    cluster = Cluster()
    async with facing(card, watchers_max=1, **FAST) as face:
        face.state.status = cluster.status
        async with watched(face) as stream:
            await stream.read()
            busy = await failure(face.admin.WatchEvents(pb.WatchEventsRequest()).read())
            assert busy.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: face.state.watch.num_watchers == 0)
        late = face.admin.WatchEvents(pb.WatchEventsRequest(), timeout=0.2)
        await late.read()
        assert (await failure(late.read())).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: face.state.watch.num_watchers == 0)


async def sse(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_rest_tells_the_same_as_events(card: ModelCard) -> None:
    cluster = Cluster()
    async with (
        serving(card, admin_key="root", **FAST) as (state, _, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        state.status = cluster.status
        assert (await client.get("/v1/admin/events")).status_code == 401
        async with client.stream("GET", "/v1/admin/events", headers={"x-api-key": "root"}) as response:
            events = sse(response)
            first = await anext(events)
            assert (first["type"], first["status"]["workers"][0]["id"]) == ("status", "expert-0")
            cluster.says = document(worker={"state": "draining"})
            assert (await anext(events))["worker"]["state"] == "draining"
        await until(lambda: state.watch.num_watchers == 0)


async def test_grpc_brings_the_traces_that_rest_does(card: ModelCard) -> None:
    async with facing(card) as face:
        answer = await face.admin.GetTrace(pb.GetTraceRequest(seconds=2.5))
        left_out = await face.admin.GetTrace(pb.GetTraceRequest())
        wrong = [await failure(face.admin.GetTrace(pb.GetTraceRequest(seconds=s))) for s in (0, 61, float("nan"))]
    assert (list(answer.traces), list(answer.silent)) == ([b"2.5 s"], ["attention-1"])
    assert list(left_out.traces) == [b"5 s"]
    assert {error.code() for error in wrong} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert "accepted: a number of seconds above 0, at most 60" in (wrong[0].details() or "")

"""Scale and drain through REST, gRPC and the command, down to a real controller over its socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from expertmesh.v1 import admin_pb2 as pb

from cluster.cli import main
from cluster.commands import scale
from cluster.commands.status import Unreachable
from cluster.events import Pools
from cluster.member_link import ask_resize
from gateway.model_card import ModelCard
from gateway.server import create_app
from gateway.state import GatewayState
from tests.unit.gateway_world import card_of, state_of, write_checkpoint
from tests.unit.grpc_world import details_of, facing, failure
from tests.unit.served_controller import WAIT_S, Cluster


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def joined(state: GatewayState, cluster: Cluster) -> None:
    """The gateway's questions go to this controller."""

    async def resize(asked: Any) -> Any:
        return await ask_resize(cluster.address, "token", WAIT_S, asked)

    state.resize = resize


@asynccontextmanager
async def gateway(card: ModelCard, cluster: Cluster, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    state, _ = state_of(card, **limits)
    joined(state, cluster)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


async def test_rest_scales_and_the_next_term_is_told_before_the_answer(card: ModelCard, cluster: Cluster) -> None:
    async with gateway(card, cluster) as client:
        answer = await client.post("/v1/admin/scale", json={"attention": 2, "experts": 3})
    assert answer.json() == {
        "pools": {
            "attention": {"wanted": 2, "ready": 0, "leaving": 0},
            "expert": {"wanted": 3, "ready": 0, "leaving": 0},
        }
    }
    assert cluster.driver.remembered[-1].pools == Pools.of_sizes(2, 3)
    started = {cluster.driver.started.get(timeout=WAIT_S).id for _ in range(5)}
    assert started == {"attention-0", "attention-1", "expert-0", "expert-1", "expert-2"}


async def test_rest_drains_by_name(card: ModelCard, cluster: Cluster) -> None:
    async with gateway(card, cluster) as client:
        await client.post("/v1/admin/scale", json={"experts": 2})
        answer = await client.post("/v1/admin/drain", json={"worker": "expert-0"})
    assert answer.json()["pools"]["expert"]["wanted"] == 1
    assert cluster.driver.remembered[-1].pools == Pools(("attention-0",), ("expert-1",))


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("scale", {"attention": 0}, "attention", "attention is 0; accepted: 1 to 256 workers"),
        ("scale", {"experts": 257}, "experts", "experts is 257; accepted: 1 to 256 workers"),
        ("scale", {"experts": 2**63}, "experts", "accepted: a whole number of workers, or null"),
        ("scale", {"experts": True}, "experts", "experts is true; accepted: a whole number of workers"),
        ("scale", {"experts": 1.5}, "experts", "experts is 1.5; accepted: a whole number of workers"),
        ("scale", {"expert": 2}, "expert", "expert is 2; accepted: no such field; known: attention, experts"),
        ("scale", {}, "attention, experts", "accepted: a number of workers for either, or for both"),
        ("drain", {}, "worker", "worker is null; accepted: the id of a worker"),
        ("drain", {"worker": "expert-9"}, "worker", "accepted: one of attention-0, expert-0"),
        ("drain", {"worker": "expert-0"}, "worker", "the expert pool has 1: scale it up first"),
    ],
)
async def test_what_cannot_be_is_a_400_that_names_it(
    card: ModelCard, cluster: Cluster, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    async with gateway(card, cluster) as client:
        answer = await client.post(f"/v1/admin/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], words in error["message"]) == (400, param, True), error
    assert not cluster.driver.remembered


async def test_doors_that_change_the_cluster_ask_for_the_key(card: ModelCard, cluster: Cluster) -> None:
    async with gateway(card, cluster, api_key="sesame") as client:
        for path, body in (("scale", {"experts": 2}), ("drain", {"worker": "expert-0"})):
            assert (await client.post(f"/v1/admin/{path}", json=body)).status_code == 401
        key = {"authorization": "Bearer sesame"}
        assert (await client.post("/v1/admin/scale", json={"experts": 2}, headers=key)).status_code == 200
    async with facing(card, api_key="sesame") as face:
        assert (await failure(face.admin.Scale(pb.ScaleRequest(experts=2)))).code() == (
            grpc.StatusCode.UNAUTHENTICATED
        )


async def test_pools_that_could_not_be_kept_for_the_next_term_are_said_to_be_so(
    card: ModelCard, cluster: Cluster
) -> None:
    """And asked again they are kept, though nothing has changed since."""
    cluster.driver.why_not_kept = "the store is away"
    async with gateway(card, cluster) as client:
        answer = await client.post("/v1/admin/scale", json={"experts": 2})
        told = "under way, but not kept for the next controller: the store is away"
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, told)
        cluster.driver.why_not_kept = ""
        assert (await client.post("/v1/admin/scale", json={"experts": 2})).status_code == 200
    assert {command.pools for command in cluster.driver.remembered} == {Pools.of_sizes(1, 2)}
    assert cluster.driver.num_kept == 1


async def test_grpc_scales_and_drains(card: ModelCard, cluster: Cluster) -> None:
    async with facing(card) as face:
        joined(face.state, cluster)
        scaled = await face.admin.Scale(pb.ScaleRequest(attention=2, experts=3))
        drained = await face.admin.Drain(pb.DrainRequest(worker="expert-2"))
        nobody = await failure(face.admin.Drain(pb.DrainRequest(worker="expert-7")))
        zero = await failure(face.admin.Scale(pb.ScaleRequest(attention=0)))
    assert [pool.workers_wanted for pool in scaled.pools] == [2, 3]
    assert [pool.workers_wanted for pool in drained.pools] == [2, 2]
    assert nobody.code() == zero.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(zero)["BadRequest"].field_violations[0].field == "attention"


# The command.


def document(ready: int, leaving: int = 0, failed: str = "") -> dict[str, Any]:
    workers = [
        {"id": "expert-0", "state": "ready", "bytes_loaded": 5, "bytes_total": 5},
        {"id": "expert-1", "state": "loading", "bytes_loaded": 1 << 20, "bytes_total": 3 << 20},
    ]
    pool = {"wanted": 2, "ready": ready, "leaving": leaving}
    return {"pools": {"expert": pool}, "scaling_failed": failed, "workers": workers[: 3 - ready]}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any] | Exception]:
    """What the gateway will say, one after another: to the order, then to each look."""
    said: list[dict[str, Any] | Exception] = []

    def fetched(*_: object) -> dict[str, Any]:
        answer = said.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(scale, "fetch_document", fetched)
    monkeypatch.setattr(scale, "fetch", fetched)
    monkeypatch.setattr(scale, "_LOOK_S", 0.0)
    return said


def test_wait_shows_progress_on_stderr_and_ends_when_nobody_is_left_to_leave(
    answers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A controller that starts anew meanwhile is waited for."""
    answers += [document(1), document(1), Unreachable("away"), document(2, leaving=1), document(2)]
    assert main(["scale", "--experts", "2", "--wait", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == {"pools": {"expert": {"wanted": 2, "ready": 2, "leaving": 0}}}
    assert "expert-1 loading 1.0 MiB of 3.0 MiB" in out.err
    assert not answers


def test_a_pool_that_cannot_be_made_ends_the_wait_with_the_reason(
    answers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers += [document(1), document(1, failed="expert-0: its memory is full")]
    assert main(["drain", "expert-1", "--wait"]) == 1
    assert "expertmesh drain: expert-0: its memory is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["scale"], "--attention, --experts: neither given"),
        (["scale", "--experts", "2", "--timeout", "0"], "--timeout: 0; accepted: seconds above 0"),
    ],
)
def test_flags_that_cannot_be_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert words in capsys.readouterr().err

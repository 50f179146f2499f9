"""Endpoints that other engines have under these names: probes, loads, what serves here, elastic pools."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from expertmesh.v1.control_pb2 import ResizeReply, ResizeRequest

from gateway.elastic import elastic_state
from gateway.model_card import ModelCard
from gateway.server import create_app
from tests.unit.gateway_world import STATUS_DOCUMENT, card_of, pool, state_of, write_checkpoint


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


class World:
    """A gateway whose controller says what `document` holds and takes every size."""

    def __init__(self, card: ModelCard) -> None:
        state, self.engine = state_of(card)
        self.asked: list[ResizeRequest] = []
        state.status, state.resize = self._status, self._resize
        self.state = state
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(state)), base_url="http://gateway"
        )

    async def _status(self) -> dict[str, Any]:
        return STATUS_DOCUMENT

    async def _resize(self, asked: ResizeRequest) -> ResizeReply:
        self.asked.append(asked)
        return ResizeReply(json=b'{"pools": {"attention": 1}}')

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()


async def test_loads_are_of_each_attention_worker_that_serves(card: ModelCard) -> None:
    """Cached blocks are not in use; what waits at the scheduler waits for all."""
    async with World(card) as world:
        whole = (await world.client.get("/v1/loads")).json()
        queues = (await world.client.get("/v1/loads?include=queues")).json()
        text = (await world.client.get("/v1/loads?format=prometheus&include=core,queues")).text
    first, second = whole["loads"]
    assert (first["dp_rank"], first["worker"], second["worker"]) == (0, "attention-0", "attention-1")
    assert (first["num_running_reqs"], first["num_waiting_reqs"], first["num_total_reqs"]) == (3, 1, 4)
    assert (first["num_used_tokens"], first["max_total_num_tokens"], first["token_usage"]) == (1600, 3200, 0.5)
    assert whole["aggregate"] == {
        "total_running_reqs": 4, "total_waiting_reqs": 6, "total_reqs": 10, "avg_token_usage": 0.25,
    }  # fmt: skip
    assert (whole["dp_rank_count"], queues["queues"]) == (2, {"waiting": 5, "waiting_tokens": 700})
    assert "loads" not in queues
    assert 'expertmesh_load_num_running_reqs{worker="attention-0"} 3.0' in text
    assert "expertmesh_load_queue_waiting 5.0" in text


@pytest.mark.parametrize("query", ["include=memory", "format=xml", "rank=1"])
async def test_loads_refuse_what_they_do_not_know(card: ModelCard, query: str) -> None:
    async with World(card) as world:
        refused = await world.client.get(f"/v1/loads?{query}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.partition("=")[0])


async def test_load_counts_what_this_gateway_has_open(card: ModelCard) -> None:
    async with World(card) as world:
        assert (await world.client.get("/load")).json() == {"server_load": 0}


async def test_server_info_names_no_paths_and_no_addresses(card: ModelCard) -> None:
    async with World(card) as world:
        answer = await world.client.get("/server_info")
    told = answer.json()
    assert (told["model"], told["max_model_len"], told["limits"]["n_max"]) == ("tiny", 256, 64)
    assert "/srv" not in answer.text
    assert "secret" not in answer.text


async def test_ping_needs_no_key(card: ModelCard) -> None:
    state, _ = state_of(card, api_key="sesam")
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert [(await client.request(how, "/ping")).status_code for how in ("GET", "POST")] == [200, 200]
        for path in ("/load", "/v1/loads", "/server_info", "/is_scaling_elastic_ep"):
            assert (await client.get(path)).status_code == 401


async def test_elastic_ep_scales_the_pools(card: ModelCard) -> None:
    """vLLM's name sizes the attention pool, SGLang's the experts'; either way to ask how it goes."""
    async with World(card) as world:
        bodies = ({"new_data_parallel_size": 3, "drain_timeout": 120}, {"new_ep_size": 4})
        answers = [await world.client.post("/scale_elastic_ep", json=body) for body in bodies]
        states = [(await world.client.request(how, "/is_scaling_elastic_ep")).json() for how in ("GET", "POST")]
        refused = [
            await world.client.post("/scale_elastic_ep", json=body)
            for body in ({}, {"new_ep_size": 0}, {"new_ep_size": True}, {"size": 2}, {"drain_timeout": 3})
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["pools"] == {"attention": 1}
    assert world.asked == [ResizeRequest(attention=3), ResizeRequest(experts=4)]
    assert states[0] == states[1]
    assert (states[0]["is_scaling_elastic_ep"], states[0]["phase"], states[0]["epoch"]) == (True, "preparing", 4)
    assert (states[0]["requested_ep_size"], states[0]["effective_ep_size"]) == (2, 1)
    assert {answer.status_code for answer in refused} == {400}


@pytest.mark.parametrize(
    ("expert", "failed", "expected"),
    [
        (pool(2, 2), "", (False, "idle", None)),
        (pool(2, 2, leaving=1), "", (True, "preparing", None)),
        (pool(2, 2), "no memory", (False, "failed", "no memory")),
    ],
)
def test_elastic_ep_tells_how_scaling_ended(expert: dict[str, int], failed: str, expected: Any) -> None:
    document = {**STATUS_DOCUMENT, "pools": {"attention": pool(1, 1), "expert": expert}, "scaling_failed": failed}
    told = elastic_state(document)
    assert (told["is_scaling_elastic_ep"], told["phase"], told["error"]) == expected


async def test_all_of_them_are_in_the_openapi_document(card: ModelCard) -> None:
    async with World(card) as world:
        paths = (await world.client.get("/openapi.json")).json()["paths"]
    wanted = {
        "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/ping", "/server_info", "/load",
        "/v1/loads", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    }  # fmt: skip
    assert wanted <= paths.keys()
    body = paths["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"system", "thinking", "top_k", "stop_sequences"} <= body["properties"].keys()

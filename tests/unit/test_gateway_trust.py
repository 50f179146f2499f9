"""What a stranger, a browser and an operator get: no more than they should, and enough to find a call again."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.logs import JsonLines, TextLines
from gateway.model_card import ModelCard
from gateway.server import create_app
from gateway.visit import Trace, Visit
from tests.unit.gateway_world import card_of, state_of, write_checkpoint
from tests.unit.grpc_world import facing, failure

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


@asynccontextmanager
async def gateway(card: ModelCard, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(state_of(card, **limits)[0]))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


# Traces.


@pytest.mark.parametrize(
    "given",
    [
        "", "00", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-1", "\r\n", "é" * 55,
    ],
)  # fmt: skip
def test_a_traceparent_that_cannot_be_read_begins_a_new_trace(given: str) -> None:
    trace = Trace.below(given)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", trace.parent)
    assert TRACE not in trace.parent
    assert trace != Trace.below(given)


@pytest.mark.parametrize("given", [f"00-{TRACE}-{PARENT}-01", f"01-{TRACE}-{PARENT}-01-of-the-future"])
def test_a_call_is_a_span_of_its_clients_trace(given: str) -> None:
    """A later version is read as this one, as the standard says."""
    one, other = Trace.below(given), Trace.below(given)
    assert (one.trace_id, one.flags) == (TRACE, "01")
    assert len({one.span_id, other.span_id, PARENT}) == 3


async def test_both_doors_name_call_and_trace_in_every_answer(card: ModelCard) -> None:
    """Also in a refusal."""
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "call-7"}
    async with gateway(card) as client:
        for body in ({"prompt": [5]}, {"prompt": []}):
            headers = (await client.post("/v1/completions", json=body, headers=sent)).headers
            assert headers["x-request-id"] == "call-7"
            assert headers["traceparent"].startswith(f"00-{TRACE}-")
    async with facing(card) as face:
        good = face.inference.Generate(pb.GenerateRequest(text="x"), metadata=tuple(sent.items()))
        await good
        bad = await failure(face.inference.Generate(pb.GenerateRequest(), metadata=tuple(sent.items())))
        for metadata in (dict(await good.trailing_metadata()), dict(bad.trailing_metadata())):
            assert metadata["x-request-id"] == "call-7"
            assert metadata["traceparent"].startswith(f"00-{TRACE}-")


# Browsers.


async def test_pages_of_other_origins_are_refused_unless_they_are_listed(card: ModelCard) -> None:
    """Without a key on loopback, any page a person opens could else scale their cluster."""
    asked = {"url": "/v1/completions", "json": {"prompt": [5]}}
    async with gateway(card) as client:
        foreign = await client.post(**asked, headers={"origin": PAGE})
        assert (await client.post(**asked, headers={"origin": "http://gateway"})).status_code == 200
        preflight = await client.options("/v1/completions", headers={"origin": PAGE})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "origin_not_allowed")
    told = f'Origin is "{PAGE}"; accepted: none (gateway.cors_origins)'
    assert foreign.json()["error"]["message"] == told
    assert not [name for name in preflight.headers if name.startswith("access-control")]


async def test_listed_pages_may_call_and_read(card: ModelCard) -> None:
    """A browser's question before the call carries no key."""
    preflight = {"origin": PAGE, "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    async with gateway(card, cors_origins=[PAGE], api_key="sesame") as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "authorization" in answer.headers["access-control-allow-headers"]
        headers = {"origin": PAGE, "x-api-key": "sesame"}
        answer = await client.post("/v1/completions", json={"prompt": [5]}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert (await client.get("/v1/models", headers=headers | {"origin": "https://x"})).status_code == 403
    async with gateway(card, cors_origins=["*"]) as client:
        assert (await client.get("/v1/models", headers={"origin": "https://x"})).status_code == 200


# Logs.


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a process writes with `cluster.log_format: json`."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


async def test_a_call_is_one_line_without_what_was_said(card: ModelCard, lines: io.StringIO) -> None:
    """In REST and gRPC: route, outcome, sizes and the key's name; no prompt, answer, path, query or key."""
    keys = [{"name": "team-a", "key": "sesame"}]
    assert card.tokens is not None
    secret, header = "lazy dog", {"x-api-key": "sesame"}
    size = len(card.tokens.encode(secret))
    async with gateway(card, keys=keys) as client:
        await client.post(f"/v1/completions?q={secret}", json={"prompt": secret, "user": secret}, headers=header)
        await client.post("/v1/completions", json={"prompt": secret, "stop": [secret, ""]}, headers=header)
        await client.get(f"/v1/models/{secret}", headers=header)
        await client.get(f"/{secret}", headers=header)
        await client.get("/health")
    async with facing(card, keys=keys) as face:
        await face.inference.Generate(pb.GenerateRequest(text=secret), metadata=(("x-api-key", "sesame"),))
        await failure(face.inference.Generate(pb.GenerateRequest(text=secret)))
    said = lines.getvalue()
    assert secret not in said
    assert "sesame" not in said
    calls = [line for line in map(json.loads, said.splitlines()) if line["logger"] == "gateway.calls"]
    names = ("call", "outcome", "key", "prompt_tokens", "generated_tokens")
    generate = "/expertmesh.v1.InferenceService/Generate"
    assert [tuple(line[name] for name in names) for line in calls] == [
        ("POST /v1/completions", "200", "team-a", size, size + 1),
        ("POST /v1/completions", "400", "team-a", 0, 0),
        ("GET /v1/models/{name:path}", "404", "team-a", 0, 0),
        ("GET (no route)", "404", "team-a", 0, 0),
        (generate, "ok", "team-a", size, size + 1),
        (generate, "401", "", 0, 0),
    ]
    assert all(re.fullmatch(r"[0-9a-f]{32}", line["trace_id"]) for line in calls[:-1])


async def test_a_failure_in_the_log_names_the_call_that_the_client_names(
    card: ModelCard, lines: io.StringIO
) -> None:
    """The client is told nothing of it but the name by which it can be found."""
    state, _ = state_of(card)
    state.status = None  # type: ignore[assignment]
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.get("/v1/admin/status", headers={"x-request-id": "call-7"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")
    failed = [line for line in map(json.loads, lines.getvalue().splitlines()) if "exception" in line]
    assert [(line["request_id"], line["level"]) for line in failed] == [("call-7", "ERROR")]
    assert "Traceback" in failed[0]["exception"]


def test_lines_for_people_say_the_same() -> None:
    record = logging.makeLogRecord({"name": "a", "levelname": "INFO", "msg": "%d of %d", "args": (1, 2)})
    assert TextLines("%(levelname)s %(name)s: %(message)s").format(record) == "INFO a: 1 of 2"
    assert json.loads(JsonLines().format(record))["message"] == "1 of 2"


async def test_a_foreign_key_at_grpc_is_told_as_a_status_with_a_name(card: ModelCard) -> None:
    async with facing(card, api_key="sesame") as face:
        error = await failure(face.inference.Generate(pb.GenerateRequest(text="x")))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert len(dict(error.trailing_metadata())["x-request-id"]) == len(Visit.of({}).name)

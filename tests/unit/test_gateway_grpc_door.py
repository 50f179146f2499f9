"""What comes to the gRPC port and is no good call: statuses with details, never a crash, never a trace."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from expertmesh.v1 import admin_pb2
from expertmesh.v1 import inference_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway import errors
from gateway.admin_service import AdminService
from gateway.errors import NotReady, Overloaded, PortInUse, Refusal
from gateway.grpc_errors import CODES, status_of
from gateway.grpc_server import GrpcServer
from gateway.model_card import ModelCard
from tests.unit.gateway_world import card_of, until, write_checkpoint
from tests.unit.grpc_world import Face, details_of, end_of, facing, failure

Code = grpc.StatusCode
Health = health_pb2.HealthCheckResponse
SERVICES = ("", "expertmesh.v1.InferenceService", "expertmesh.v1.AdminService")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


async def assert_serves(face: Face) -> None:
    assert (await face.inference.Generate(pb.GenerateRequest(text="x"))).choices[0].text == "x"
    assert face.is_idle


GARBAGE = (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 999)

BAD: dict[str, tuple[dict[str, Any], Code, str, str]] = {
    "no prompt": ({}, Code.INVALID_ARGUMENT, "prompt", "accepted: text, tokens or chat"),
    "empty text": ({"text": ""}, Code.INVALID_ARGUMENT, "prompt", "at least one character"),
    "no tokens": ({"tokens": pb.TokenIds()}, Code.INVALID_ARGUMENT, "prompt", "0 items"),
    "token": ({"tokens": pb.TokenIds(ids=[5, 99999])}, Code.INVALID_ARGUMENT, "prompt[1]", "99999; accepted: a"),
    "model": ({"text": "x", "model": "gpt-17"}, Code.NOT_FOUND, "model", '"gpt-17"; accepted: tiny'),
    "role": (
        {"chat": pb.Conversation(messages=[pb.ChatMessage(role="x")])},
        Code.INVALID_ARGUMENT, "messages[0].role", '"x"; accepted: system',
    ),
    "name": ({"text": "x", "request_id": "two words"}, Code.INVALID_ARGUMENT, "request_id", "two words"),
    "too long": ({"tokens": pb.TokenIds(ids=[5] * 300)}, Code.INVALID_ARGUMENT, "prompt", "300 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_names_field_value_and_what_is_accepted(card: ModelCard, case: str) -> None:
    fields, code, field, words = BAD[case]
    async with facing(card) as face:
        error = await failure(face.inference.Generate(pb.GenerateRequest(**fields)))
        await assert_serves(face)
    assert error.code() == code
    assert words in (error.details() or "")
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == field


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; accepted: an integer of at least 1"),
        ({"max_tokens": 9999}, "max_tokens", "accepted: at most 255"),
        ({"temperature": -1.0}, "temperature", "temperature is -1.0; accepted"),
        ({"temperature": float("nan")}, "temperature", "temperature is NaN; accepted"),
        ({"top_p": 0.0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"n": 1000}, "n", "an integer from 1 to 64"),
        ({"stop": [""]}, "stop[0]", "1 to 256 characters"),
        ({"stop_token_ids": [99999]}, "stop_token_ids[0]", "99999"),
        ({"logprobs": 21}, "logprobs", "an integer from 0 to 20"),
    ],
)
async def test_a_bad_option_is_refused_as_rest_refuses_it(
    card: ModelCard, options: dict[str, Any], field: str, words: str
) -> None:
    async with facing(card) as face:
        request = pb.GenerateStreamRequest(text="x", options=pb.GenerateOptions(**options))
        call = face.inference.GenerateStream(request)
        error = await failure(call.read())
    assert error.code() == Code.INVALID_ARGUMENT
    assert words in (error.details() or "")
    assert details_of(error)["BadRequest"].field_violations[0].field == field


async def test_bytes_that_are_no_request_are_refused(card: ModelCard) -> None:
    """Undecodable, too large, to a method or service that is not there; and garbage instead of HTTP/2."""
    async with facing(card, body_bytes_max=1024) as face:
        generate = "/expertmesh.v1.InferenceService/Generate"
        undecodable = await failure(face.channel.unary_unary(generate)(b"\xff\xff\xff"))
        large = await failure(face.inference.Generate(pb.GenerateRequest(text="x" * 2000)))
        method = await failure(face.channel.unary_unary("/expertmesh.v1.InferenceService/Nothing")(b""))
        service = await failure(face.channel.unary_unary("/nothing.Service/Nothing")(b""))
        for garbage in GARBAGE:
            reader, writer = await asyncio.open_connection("127.0.0.1", face.server.port)
            writer.write(garbage)
            writer.write_eof()
            await reader.read()
            writer.close()
        await assert_serves(face)
    assert undecodable.code() == Code.INVALID_ARGUMENT
    assert details_of(undecodable)["ErrorInfo"].reason == "INVALID_MESSAGE"
    assert large.code() == Code.RESOURCE_EXHAUSTED
    assert (method.code(), service.code()) == (Code.UNIMPLEMENTED, Code.UNIMPLEMENTED)


async def test_refusals_for_load_and_readiness_say_when_to_come_back(card: ModelCard) -> None:
    async with facing(card) as face:
        face.engine.refusal = Overloaded("the queue is full", retry_after_s=2.4)
        busy = await failure(face.inference.Generate(pb.GenerateRequest(text="x")))
        face.engine.refusal = NotReady("no worker", retry_after_s=1)
        early = await failure(face.inference.Generate(pb.GenerateRequest(text="x")))
    assert (busy.code(), busy.details()) == (Code.RESOURCE_EXHAUSTED, "the queue is full")
    assert details_of(busy)["RetryInfo"].retry_delay.ToMilliseconds() == 2400
    assert details_of(busy)["ErrorInfo"].reason == "RATE_LIMIT_EXCEEDED"
    assert (early.code(), details_of(early)["RetryInfo"].retry_delay.seconds) == (Code.UNAVAILABLE, 1)


async def test_more_calls_than_the_bound_are_refused(card: ModelCard) -> None:
    async with facing(card, grpc_rpcs_max=16) as face:
        face.engine.accepts.clear()
        waiting = [face.inference.Generate(pb.GenerateRequest(text="x")) for _ in range(16)]
        await until(lambda: face.state.ledger.num_open == 16)
        error = await failure(face.inference.Generate(pb.GenerateRequest(text="x")))
        face.engine.accepts.set()
        await asyncio.gather(*waiting)
    assert error.code() == Code.RESOURCE_EXHAUSTED


async def test_what_fails_inside_is_told_without_its_inside(
    card: ModelCard, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker's words without paths, in the stream too; a bug of ours not at all, but in the log."""
    async with facing(card) as face:
        face.engine.failure_at = 1
        call = face.inference.GenerateStream(pb.GenerateStreamRequest(tokens=pb.TokenIds(ids=[5, 6])))
        await call.read()
        gave_up = await failure(call.read())
        face.state.status = None  # type: ignore[assignment]
        bug = await failure(face.admin.GetStatus(admin_pb2.GetStatusRequest()))
        assert face.is_idle
    assert (gave_up.code(), gave_up.details()) == (Code.INTERNAL, "no expert at <path>")
    assert (bug.code(), bug.details()) == (Code.INTERNAL, "internal error")
    assert "NoneType" in caplog.text


def test_every_refusal_has_a_status_short_enough_to_be_read() -> None:
    """Clients read 8 KiB of metadata: message and details together, however long and foreign the words."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Refusal)]
    assert set(CODES) <= set(kinds)
    for kind in kinds:
        status = status_of(kind("日" * 10_000, param="messages", retry_after_s=1.0))
        assert (status.code == Code.INTERNAL.value[0]) == (kind.status == 500)
        assert 9 * len(status.message) + 4 * status.ByteSize() / 3 < 8000


async def test_keys_come_as_bearer_or_x_api_key_and_probes_need_none(card: ModelCard) -> None:
    async with facing(card, api_key="sesam") as face:
        for metadata, is_let_in in (
            ((), False),
            ((("authorization", "Bearer sesam"),), True),
            ((("x-api-key", "sesam"),), True),
            ((("authorization", "Bearer sesame"),), False),
            ((("authorization", "Basic sesam"),), False),
        ):
            stream = face.inference.GenerateStream(pb.GenerateStreamRequest(text="a"), metadata=metadata)
            admin = face.admin.ListPools(admin_pb2.ListPoolsRequest(), metadata=metadata)
            expected = Code.OK if is_let_in else Code.UNAUTHENTICATED
            assert (await end_of(stream), await admin.code()) == (expected, expected)
        error = await failure(face.inference.Generate(pb.GenerateRequest(text="a")))
        assert details_of(error)["ErrorInfo"].reason == "INVALID_API_KEY"
        assert await health_of(face, "") == Health.SERVING
        assert "expertmesh.v1.InferenceService" in await listed(face)


async def listed(face: Face) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(face.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([question]))
    answer = await call.read()
    return {service.name for service in answer.list_services_response.service}


async def test_reflection_lists_the_services(card: ModelCard) -> None:
    async with facing(card) as face:
        names = await listed(face)
    assert names == {*SERVICES[1:], "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def health_of(face: Face, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(face.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_follows_readiness_and_drain(card: ModelCard) -> None:
    """Inference serves while calls are taken, admin until the drain; who watches is told before the end."""
    async with facing(card) as face:
        stub: Any = health_pb2_grpc.HealthStub(face.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]))
        assert (await watch.read()).status == Health.SERVING
        face.engine.not_ready = "no attention worker has joined yet"
        assert (await watch.read()).status == Health.NOT_SERVING
        assert [await health_of(face, name) for name in SERVICES] == [
            Health.NOT_SERVING, Health.NOT_SERVING, Health.SERVING
        ]  # fmt: skip
        face.engine.not_ready = ""
        assert (await watch.read()).status == Health.SERVING
        face.state.is_draining = True
        await face.server.drain()
        assert (await watch.read()).status == Health.NOT_SERVING
        assert [await health_of(face, name) for name in SERVICES] == [Health.NOT_SERVING] * 3


async def placed() -> None:
    """No placement yet."""


async def test_an_occupied_port_is_refused_by_number(card: ModelCard) -> None:
    async with facing(card) as face:
        second = GrpcServer("127.0.0.1", face.server.port, face.state, AdminService(face.state, placed))
        with pytest.raises(PortInUse, match=rf"127\.0\.0\.1:{face.server.port}: the port is in use"):
            await second.start()
        await second.stop(0)
        await assert_serves(face)

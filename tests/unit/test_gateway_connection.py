"""What a client can do to a connection before there is a call: nothing without bounds, nothing to others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.model_card import ModelCard
from tests.unit.gateway_world import card_of, serving, until, write_checkpoint

HEAD = b"GET /health HTTP/1.1\r\nhost: gateway\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


async def connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def answered(url: str, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Status and OpenAI's error of what is answered before the gateway hangs up."""
    reader, writer = await connected(url)
    writer.write(sent)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(body)["error"]


async def write_without_end(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"a" * 4096)
        await writer.drain()


async def is_well(url: str) -> bool:
    reader, writer = await connected(url)
    writer.write(HEAD + b"connection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"x: " + b"a" * 40_000,
        HEAD + b"a: b\r\n" * 8_000,
        b"GET /" + b"a" * 40_000,
    ],
    ids=["one header", "many headers", "the path"],
)
async def test_a_head_without_end_is_refused_and_not_kept(card: ModelCard, sent: bytes) -> None:
    async with serving(card, head_bytes_max=8192) as (_, _, url):
        status, error = await answered(url, sent)
        assert (status, error["code"]) == (431, "request_headers_too_large")
        assert await is_well(url)


async def test_trailers_without_end_are_hung_up_on(card: ModelCard) -> None:
    """They come after the body, and the parser keeps them likewise."""
    async with serving(card, head_bytes_max=8192) as (_, _, url), asyncio.timeout(10):
        _, writer = await connected(url)
        writer.write(POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ")
        with pytest.raises(ConnectionError):
            await write_without_end(writer)
        assert await is_well(url)


async def test_a_body_larger_than_any_head_is_no_head(card: ModelCard) -> None:
    """Only what is held back counts, however often the body comes in pieces."""
    body = json.dumps({"prompt": "a" * 50_000, "max_tokens": 0}).encode()
    async with serving(card, head_bytes_max=8192) as (_, _, url):
        reader, writer = await connected(url)
        writer.write(POST + b"content-length: %d\r\n\r\n" % len(body))
        for begin in range(0, len(body), 5000):
            writer.write(body[begin : begin + 5000])
            await writer.drain()
        assert b'"max_tokens is 0;' in await reader.readuntil(b"}}")
        writer.close()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00 nonsense\r\n\r\n", HEAD + b"content-length: -5\r\n\r\n"])
async def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(card: ModelCard, sent: bytes) -> None:
    async with serving(card) as (_, _, url):
        assert await answered(url, sent) == (
            400,
            {
                "message": "what was sent is not HTTP; accepted: HTTP/1.0 and HTTP/1.1",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_http",
            },
        )


async def test_who_says_nothing_is_hung_up_on_and_who_says_half_is_told(card: ModelCard) -> None:
    async with serving(card, client_stall_s_max=0.05) as (_, _, url):
        silent, writer = await connected(url)
        assert await silent.read() == b""
        writer.close()
        status, error = await answered(url, HEAD)
        assert (status, error["code"]) == (408, "request_timeout")


async def test_a_second_head_has_its_time_too(card: ModelCard) -> None:
    """uvicorn's own time for the next request ends with its first byte."""
    async with serving(card, client_stall_s_max=0.05) as (_, _, url):
        reader, writer = await connected(url)
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET")
        assert b" 408 " in await reader.read()
        writer.close()


async def test_a_stream_outlives_the_time_for_a_head(card: ModelCard) -> None:
    """Its time is up long before the answer is; what is answered has no head to send."""
    async with serving(card, client_stall_s_max=0.05) as (_, engine, url):
        engine.hold_at = 1
        reader, writer = await connected(url)
        body = b'{"prompt": [5, 6], "stream": true}'
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: engine.num_running == 1)
        silent, other = await connected(url)
        assert await silent.read() == b""  # as long as the time for a head
        other.close()
        engine.go_on.set()
        assert b"data: [DONE]" in await reader.read()
        writer.close()


async def test_connections_are_bounded_and_the_bound_is_said(card: ModelCard) -> None:
    async with serving(card, connections_max=2) as (_, _, url):
        held = [await connected(url) for _ in range(2)]
        status, error = await answered(url, b"")
        assert (status, error["code"]) == (429, "rate_limit_exceeded")
        assert error["message"] == "this gateway holds at most 2 connections"
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        while not await is_well(url):
            continue


async def test_an_idle_connection_is_kept_for_as_long_as_said(card: ModelCard) -> None:
    """Then it is closed; and by default it outlives those of clients, which would else send into its end."""
    assert GatewayConfig().client_idle_s > 60
    async with serving(card, client_idle_s=1) as (_, _, url):
        reader, writer = await connected(url)
        for _ in range(2):
            writer.write(HEAD + b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()

"""The HTTP face over real sockets: openai's client reads our streams, and whoever leaves, leaves nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI

from gateway.errors import CannotListen, PortInUse
from gateway.http_server import HttpServer
from gateway.metrics import GatewayMetrics
from gateway.model_card import ModelCard
from gateway.server import create_app
from gateway.stream import EventStream
from tests.unit.gateway_world import card_of, serving, state_of, until, write_checkpoint

CHAT: list[Any] = [{"role": "user", "content": "Grüße 🙂"}]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def outcomes(metrics: GatewayMetrics) -> Counter[str]:
    (family,) = metrics.requests.collect()
    counts: Counter[str] = Counter()
    for sample in family.samples:
        if sample.name.endswith("_total"):
            counts[sample.labels["outcome"]] += int(sample.value)
    return counts


async def test_a_chat_stream_is_what_openais_client_expects(card: ModelCard) -> None:
    """Role first, then the text in whole characters, the reason on the last, usage alone at the end."""
    async with serving(card) as (_, engine, url), client_of(url) as client:
        engine.cached = {0: 3}
        stream = await client.chat.completions.create(
            model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in [*middle, last]) == "user\nGrüße 🙂"
    assert [c.choices[0].finish_reason for c in [first, *middle, last]] == [None] * (len(chunks) - 2) + ["stop"]
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == engine.submissions[0].prompt.index(engine.eos) + 1
    assert usage.usage.prompt_tokens_details is not None
    assert usage.usage.prompt_tokens_details.cached_tokens == 3
    assert all(c.usage is None for c in chunks[:-1])
    assert len({(c.id, c.created) for c in chunks}) == 1


async def test_a_completion_stream_ends_each_choice_at_its_stop_string(card: ModelCard) -> None:
    """Nothing of a stop string is streamed, however tokens fall."""
    async with serving(card) as (_, engine, url), client_of(url) as client:
        stream = await client.completions.create(
            model="tiny", prompt=["abc STOP def", "no such word"], stop="STOP", n=2, max_tokens=100, stream=True
        )
        texts, reasons = dict.fromkeys(range(4), ""), {}
        async for chunk in stream:
            (choice,) = chunk.choices
            assert choice.index not in reasons
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == ["abc ", "abc ", "no such word", "no such word"]
    assert list(reasons.values()) == ["stop"] * 4
    assert engine.num_running == 0


async def test_the_bytes_of_a_stream(card: ModelCard) -> None:
    """Unnamed events, [DONE] last, and headers that keep proxies from holding tokens back."""
    body = {"prompt": [5, 6], "stream": True, "return_token_ids": True, "logprobs": 0, "foo": 1}
    async with serving(card) as (_, _, url), httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert response.headers["x-expertmesh-ignored-fields"] == "foo"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert choices[0]["prompt_token_ids"] == [5, 6]
    assert [token for choice in choices for token in choice["token_ids"]] == [5, 6, min(card.eos)]
    assert [p for choice in choices for p in choice["logprobs"]["token_logprobs"]] == [-0.25, -0.5, -0.75]


async def test_a_lost_worker_is_a_pause_in_the_stream(card: ModelCard) -> None:
    async with serving(card) as (_, engine, url), client_of(url) as client:
        engine.deaths = {0, 4, 7}
        stream = await client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "user\nGrüße 🙂"
    assert engine.num_refused == 3


async def test_an_error_after_the_headers_is_an_event(card: ModelCard) -> None:
    """openai's client raises it; the stream still ends properly."""
    async with serving(card) as (state, engine, url), client_of(url) as client:
        engine.failure_at = 2
        stream = await client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
        with pytest.raises(APIError, match="no expert at <path>"):
            _ = [chunk async for chunk in stream]
        async with httpx.AsyncClient() as plain:
            response = await plain.post(f"{url}/v1/completions", json={"prompt": [5, 6, 7], "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
        await until(lambda: outcomes(state.metrics) == {"500": 2})


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_hangs_up_cancels_its_work(card: ModelCard, is_stream: bool) -> None:
    """Streamed or not, while tokens come; the gateway ends idle."""
    async with serving(card) as (state, engine, url):
        engine.hold_at = 2
        body = {"prompt": [5, 6, 7, 8], "n": 3, "stream": is_stream}
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
            await until(lambda: engine.num_running == 3)
            asking.cancel()
            await asyncio.wait({asking})
        await until(lambda: engine.num_running == 0)
        await until(lambda: outcomes(state.metrics) == {"hung_up": 1})
        assert len(engine.cancelled) == 1
        assert state.ledger.num_open == 0


async def test_a_client_that_hangs_up_leaves_the_queue(card: ModelCard) -> None:
    """Before the scheduler has even answered."""
    async with serving(card) as (state, engine, url):
        engine.accepts.clear()
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json={"prompt": [5]}))
            await until(lambda: state.ledger.num_open == 1)
            asking.cancel()
            await asyncio.wait({asking})
        await until(lambda: state.ledger.num_open == 0)
        assert len(engine.cancelled) == 1


async def test_many_streams_do_not_mix(card: ModelCard) -> None:
    async with serving(card) as (state, _, url), client_of(url) as client:

        async def ask(number: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=f"this is client {number}", max_tokens=100, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(ask, range(16)))
        assert texts == [f"this is client {number}" for number in range(16)]
        assert state.ledger.num_open == 0


async def test_a_client_that_does_not_read_counts_as_gone() -> None:
    """Its socket is full for `client_stall_s_max`: the events' source is closed and the end reported."""
    closed: list[bool] = []
    ends: list[bool] = []

    async def events() -> Any:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = EventStream(events(), {}, stall_s_max=0.01, on_end=ends.append)
    await stream({"type": "http"}, receive, send)
    assert (closed, ends) == ([True], [False])


async def test_stopping_lets_calls_in_flight_end(card: ModelCard) -> None:
    """No new connections, the running stream to its end."""
    state, engine = state_of(card)
    server = HttpServer("127.0.0.1", 0)
    await server.start(create_app(state), state.config, stop_timeout_s=5)
    engine.hold_at = 1
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        asking = asyncio.create_task(client.post(url, json={"prompt": [5, 6], "stream": True}))
        await until(lambda: engine.num_running == 1)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        engine.go_on.set()
        assert (await asking).text.endswith("data: [DONE]\n\n")
    await stopping
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)
    await server.stop()


def test_a_port_in_use_is_said_before_anything_is_served() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"cannot listen on 127.0.0.1:{port}: the port is in use"):
            HttpServer("127.0.0.1", port)
    with pytest.raises(CannotListen, match=r"cannot listen on no.such.host.invalid:1: no such address"):
        HttpServer("no.such.host.invalid", 1)

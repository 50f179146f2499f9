"""Bodies on their way in: who is refused anyway is told at once, and all bodies together are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from gateway.config import GatewayConfig
from gateway.model_card import ModelCard
from tests.unit.gateway_world import EchoEngine, card_of, serving, until, write_checkpoint

PATH = "/v1/completions"
GOOD = b'{"prompt": [5, 6]}'


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


async def answer_before_body(url: str, declared: int, path: str = PATH) -> str:
    """Send the head of a request and none of its body; the answer's head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {declared}\r\n\r\n"
    )
    writer.write(head.encode())
    try:
        async with asyncio.timeout(5):
            return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()
        await writer.wait_closed()


def never_ready(engine: EchoEngine) -> None:
    engine.not_ready, engine.model_len_max = "no attention worker has joined yet", 0


@pytest.mark.parametrize(
    ("change", "limits", "declared", "status"),
    [
        (never_ready, {}, 100, "503"),
        (lambda engine: None, {"body_bytes_max": 1024}, 1025, "413"),
        (lambda engine: setattr(engine, "hold_at", 0), {"in_flight_max": 1}, 100, "429"),
    ],
    ids=["no worker has ever joined", "too large", "full"],
)
async def test_what_is_hopeless_is_refused_before_its_body_is_read(
    card: ModelCard, change: Callable[[EchoEngine], None], limits: dict[str, Any], declared: int, status: str
) -> None:
    async with serving(card, **limits) as (state, engine, url), httpx.AsyncClient() as client:
        first = asyncio.create_task(client.post(url + PATH, content=GOOD))  # fills the gateway where it is held
        change(engine)
        if status == "429":
            await until(lambda: state.ledger.num_open == 1)
        head = await answer_before_body(url, declared)
        assert head.split()[1] == status
        assert "retry-after" in head.lower() or status == "413"
        engine.go_on.set()
        await first


async def test_a_scheduler_that_is_away_for_a_while_is_waited_for(card: ModelCard) -> None:
    """It has told of workers before: its restart is a pause, not a refusal."""
    async with serving(card) as (_, engine, url), httpx.AsyncClient() as client:
        engine.not_ready = "the stream to the scheduler ended"
        engine.accepts.clear()
        asking = asyncio.create_task(client.post(url + PATH, content=GOOD))
        engine.accepts.set()
        assert (await asking).status_code == 200


async def test_all_bodies_together_are_bounded(card: ModelCard) -> None:
    """By what has arrived; and room comes back however a body ends."""
    rest = asyncio.Event()

    async def slow(begin: bytes) -> AsyncIterator[bytes]:
        yield begin
        await rest.wait()
        yield GOOD

    async def whole(body: bytes) -> AsyncIterator[bytes]:
        yield body  # its length is not declared

    limits = {"body_bytes_max": 2048, "bodies_bytes_max": 2048}
    async with serving(card, **limits) as (state, _, url), httpx.AsyncClient() as client:
        first = asyncio.create_task(client.post(url + PATH, content=slow(b" " * 1500)))
        await until(lambda: state.intake.num_bytes == 1500)
        assert (await answer_before_body(url, 549)).split()[1] == "429"
        refused = await client.post(url + PATH, content=whole(b" " * 549))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "1,500 bytes are being read; this gateway reads at most 2,048" in refused.json()["error"]["message"]
        fits = await client.post(url + PATH, content=GOOD)
        leaving = asyncio.create_task(client.post(url + PATH, content=slow(b" " * 100)))
        await until(lambda: state.intake.num_bytes == 1600)
        leaving.cancel()
        await until(lambda: state.intake.num_bytes == 1500)
        rest.set()
        assert (fits.status_code, (await first).status_code) == (200, 200)
        assert state.intake.num_bytes == 0


def test_a_body_of_full_size_must_fit() -> None:
    with pytest.raises(ValidationError, match="bodies_bytes_max is 2048; accepted: at least body_bytes_max, 4096"):
        GatewayConfig(body_bytes_max=4096, bodies_bytes_max=2048)

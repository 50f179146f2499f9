"""TLS and mutual TLS over real sockets, at both doors, with certificates made here."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import inference_pb2_grpc

from cluster.commands.status import CLIENT_CERT_VARIABLE, Unreachable, fetch_document
from gateway import tls
from gateway.config import GatewayConfig
from gateway.errors import TlsUnusable
from gateway.model_card import ModelCard
from tests.unit.certificates import Authority, Pair
from tests.unit.gateway_world import card_of, serving, write_checkpoint
from tests.unit.grpc_world import facing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def card(folder: Path) -> ModelCard:
    return card_of(write_checkpoint(folder, temperature=0.0))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Authority:
    return Authority(folder, "our-authority")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Authority:
    """Nobody trusts it."""
    return Authority(folder, "their-authority")


@pytest.fixture(scope="module")
def server(ours: Authority) -> Pair:
    return ours.pair("server")


def one_way(server: Pair) -> dict[str, Any]:
    return {"tls_cert": str(server.cert), "tls_key": str(server.key)}


def mutual(server: Pair, clients: Authority) -> dict[str, Any]:
    return one_way(server) | {"tls_client_ca": str(clients.cert)}


def trusting(authority: Authority, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.cert))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


async def over_rest(card: ModelCard, settings: dict[str, Any], context: ssl.SSLContext) -> str:
    async with serving(card, **settings) as (_, _, url), httpx.AsyncClient(verify=context) as client:
        answer = await client.post(f"{url.replace('http:', 'https:')}/v1/completions", json={"prompt": "hello"})
        return str(answer.json()["choices"][0]["text"])


async def over_grpc(card: ModelCard, settings: dict[str, Any], credentials: grpc.ChannelCredentials) -> str:
    async with facing(card, **settings) as face, grpc.aio.secure_channel(face.address, credentials) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = await stub.Generate(pb.GenerateRequest(text="hello"), timeout=10)
        return str(answer.choices[0].text)


def grpc_trusting(authority: Authority, own: Pair | None = None) -> grpc.ChannelCredentials:
    pair = (None, None) if own is None else (own.key.read_bytes(), own.cert.read_bytes())
    return grpc.ssl_channel_credentials(authority.cert.read_bytes(), *pair)


async def test_both_doors_speak_tls(card: ModelCard, server: Pair, ours: Authority) -> None:
    assert await over_rest(card, one_way(server), trusting(ours)) == "hello"
    assert await over_grpc(card, one_way(server), grpc_trusting(ours)) == "hello"


async def test_who_trusts_another_authority_is_told_nothing(
    card: ModelCard, server: Pair, theirs: Authority
) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await over_rest(card, one_way(server), trusting(theirs))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await over_grpc(card, one_way(server), grpc_trusting(theirs))
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_client_with_a_certificate_is_let_in(card: ModelCard, server: Pair, ours: Authority) -> None:
    client = ours.pair("client")
    assert await over_rest(card, mutual(server, ours), trusting(ours, client)) == "hello"
    assert await over_grpc(card, mutual(server, ours), grpc_trusting(ours, client)) == "hello"


@pytest.mark.parametrize("has_one", [False, True])
async def test_a_client_without_one_or_with_another_authoritys_is_not(
    card: ModelCard, server: Pair, ours: Authority, theirs: Authority, has_one: bool
) -> None:
    own = theirs.pair("stranger") if has_one else None
    # In TLS 1.3 a client learns that it was refused when it reads, not from its handshake.
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        await over_rest(card, mutual(server, ours), trusting(ours, own))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await over_grpc(card, mutual(server, ours), grpc_trusting(ours, own))
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_plain_speech_and_old_versions_are_not_answered(
    card: ModelCard, server: Pair, ours: Authority
) -> None:
    """And the gateway goes on."""
    async with serving(card, **one_way(server)) as (_, _, url):
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()
        old = trusting(ours)
        with pytest.deprecated_call():
            old.minimum_version, old.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=old)
        async with httpx.AsyncClient(verify=trusting(ours)) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200


async def test_commands_come_in_with_a_certificate(
    card: ModelCard, server: Pair, ours: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = folder / "own.pem"
    own.write_bytes(ours.pair("operator").both())
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.cert))
    async with serving(card, **mutual(server, ours), admin_key="root") as (_, _, url):
        asked = (url.replace("http:", "https:"), "root", "/v1/admin/status", "workers")
        monkeypatch.setenv(CLIENT_CERT_VARIABLE, str(own))
        assert await asyncio.to_thread(fetch_document, *asked) == {"workers": []}
        monkeypatch.setenv(CLIENT_CERT_VARIABLE, str(folder / "nothing.pem"))
        with pytest.raises(Unreachable, match=r"EXPERTMESH_CLIENT_CERT: .*nothing\.pem"):
            await asyncio.to_thread(fetch_document, *asked)


def test_files_that_cannot_be_used_are_named(
    server: Pair, ours: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is served, and without a question at the terminal."""
    other, hidden = ours.pair("other"), ours.pair("hidden", password=b"secret")
    (text := folder / "text.pem").write_text("no certificate")
    good = one_way(server)
    for settings, words in (
        (
            good | {"tls_cert": str(folder / "no.pem")},
            r"tls_cert: '.*no.pem' cannot be used: No such file",
        ),
        (
            good | {"tls_cert": str(text)},
            r"tls_key: .*with tls_cert '.*text.pem': .*; accepted: a file",
        ),
        (
            good | {"tls_key": str(other.key)},
            r"tls_key: '.*other.key' cannot be used: .*key values mismatch",
        ),
        (good | {"tls_cert": str(hidden.cert), "tls_key": str(hidden.key)}, "hidden.key' .*it is encrypted"),
        (good | {"tls_client_ca": str(text)}, r"gateway.tls_client_ca: '.*text.pem' cannot be used"),
        (good | {"tls_client_ca": str(folder)}, r"gateway.tls_client_ca: .*directory"),
    ):
        for made in (tls.server_context, tls.grpc_credentials):
            with pytest.raises(TlsUnusable, match=words):
                made(GatewayConfig(**settings))


def test_settings_are_of_the_folder_they_are_given_in(server: Pair, folder: Path, monkeypatch: Any) -> None:
    """The gateway's process may run in another one."""
    monkeypatch.chdir(folder)
    config = GatewayConfig(tls_cert=server.cert.name, tls_key=server.key.name)
    monkeypatch.chdir("/")
    assert tls.server_context(config) is not None

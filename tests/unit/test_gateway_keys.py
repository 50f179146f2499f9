"""Several keys: who each lets in, whose its calls are, how much it may use, and what the configuration knows."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import grpc
import httpx
import pytest
from expertmesh.v1 import admin_pb2
from expertmesh.v1 import inference_pb2 as pb

from cluster.config import ConfigError, load_config
from gateway.accounts import Account
from gateway.config import GatewayConfig
from gateway.errors import Forbidden, Overloaded, Unauthorized
from gateway.keys import Keeper, hashed
from gateway.model_card import ModelCard
from gateway.server import create_app
from gateway.state import GatewayState
from tests.unit.gateway_world import card_of, state_of, until, write_checkpoint
from tests.unit.grpc_world import details_of, facing, failure

TEAMS = ({"name": "team-a", "key": "alpha"}, {"name": "team-b", "key": "beta", "in_flight_max": 1})


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


def client_of(state: GatewayState, key: str = "") -> httpx.AsyncClient:
    transport, headers = httpx.ASGITransport(create_app(state)), {"x-api-key": key} if key else {}
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


# Who may enter.

DOORS = [
    # configured, presented, may use the model, may administer
    ({}, "", True, True),
    ({}, "anything", True, True),
    ({"api_key": "open"}, "open", True, True),
    ({"api_key": "open"}, "", False, False),
    ({"api_key": "open", "admin_key": "root"}, "open", True, False),
    ({"api_key": "open", "admin_key": "root"}, "root", True, True),
    ({"api_key": "open", "admin_key": "root"}, "ope", False, False),
    ({"admin_key": "root"}, "", True, False),
    ({"admin_key": "root"}, "root", True, True),
    ({"keys": TEAMS}, "alpha", True, False),
    ({"keys": TEAMS}, "", False, False),
    ({"keys": TEAMS, "admin_key": "root"}, "beta", True, False),
    ({"keys": TEAMS, "admin_key": "root"}, "root", True, True),
    ({"keys": TEAMS, "api_key": hashed("open")}, "open", True, True),
    ({"keys": TEAMS, "api_key": hashed("open")}, str(hashed("open")), False, False),
]


@pytest.mark.parametrize(("configured", "presented", "may_use", "may_administer"), DOORS)
def test_a_key_opens_its_doors_and_no_other(
    configured: dict[str, Any], presented: str, may_use: bool, may_administer: bool
) -> None:
    """A hash, which a reader of the configuration knows, opens none."""
    keeper = Keeper(GatewayConfig(**configured))
    for is_admin, is_let_in in ((False, may_use), (True, may_administer)):
        for keys in ((f"Bearer {presented}", ""), ("", presented)):
            try:
                keeper.admit(*keys, is_admin=is_admin)
            except (Unauthorized, Forbidden):
                assert not is_let_in
            else:
                assert is_let_in


async def test_both_doors_know_the_admin_key(card: ModelCard) -> None:
    """401 for who is not known, 403 for who is and may not."""
    limits = {"keys": TEAMS, "admin_key": "root"}
    for key, status, code in (
        ("", 401, "UNAUTHENTICATED"),
        ("alpha", 403, "PERMISSION_DENIED"),
        ("root", 200, "OK"),
    ):
        async with client_of(state_of(card, **limits)[0], key) as client:
            assert (await client.get("/v1/admin/status")).status_code == status
        async with facing(card, **limits) as face:
            call = face.admin.ListPools(admin_pb2.ListPoolsRequest(), metadata=(("x-api-key", key),))
            assert await call.code() == grpc.StatusCode[code]


# Whose calls they are.


async def test_a_named_key_is_the_tenant_whatever_its_client_says(card: ModelCard) -> None:
    """In REST and gRPC; a key without a name leaves `user` its meaning."""
    limits = {"keys": TEAMS, "api_key": "open"}
    for key, tenant in (("alpha", "team-a"), ("open", "ann")):
        state, engine = state_of(card, **limits)
        async with client_of(state, key) as client:
            for stream in (False, True):
                body = {"prompt": [5], "user": "ann", "stream": stream}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
        async with facing(card, **limits) as face:
            asked = pb.GenerateRequest(text="x", options=pb.GenerateOptions(user="ann"))
            await face.inference.Generate(asked, metadata=(("authorization", f"Bearer {key}"),))
            submitted = engine.submissions + face.engine.submissions
        assert [submission.tenant for submission in submitted] == [tenant] * 3


@pytest.mark.parametrize(("shared_by", "are_apart"), [("all", False), ("key", True), ("user", True)])
async def test_cached_prefixes_are_kept_apart_by_key(card: ModelCard, shared_by: str, are_apart: bool) -> None:
    """Also for a client that gives another key's salt as its own."""
    salts = set()
    state, engine = state_of(card, keys=TEAMS, api_key="open", cache_shared_by=shared_by)
    for key, salt in (("alpha", "s"), ("beta", "s"), ("open", "s"), ("open", "team-a/s")):
        async with client_of(state, key) as client:
            await client.post("/v1/completions", json={"prompt": [5], "cache_salt": salt})
        salts.add(engine.submissions[-1].cache_salt)
    assert len(salts) == (4 if are_apart else 2)


# How much.


def test_calls_in_flight_are_counted_from_entry_to_leave() -> None:
    account = Account("a", in_flight_max=2, retry_after_s=7)
    account.enter(0.0)
    account.enter(0.0)
    with pytest.raises(Overloaded, match=r"key 'a' has used its calls in flight; accepted: at most 2") as refused:
        account.enter(0.0)
    assert refused.value.retry_after_s == 7
    account.leave()
    account.enter(0.0)


def test_requests_come_back_evenly_and_retry_after_says_when() -> None:
    """Thirty at once, then one every two seconds; who waits as told gets in, and a refusal uses nothing."""
    account = Account("a", requests_per_minute=30)
    for _ in range(30):
        account.enter(100.0)
    now_s = 100.0
    for _ in range(5):
        with pytest.raises(Overloaded, match="requests per minute") as refused:
            account.enter(now_s)
        assert refused.value.retry_after_s == pytest.approx(2.0, abs=1e-4)
        now_s += 2.0 + 1e-6
        account.enter(now_s)
    for _ in range(30):
        account.enter(now_s + 3600)
    with pytest.raises(Overloaded):
        account.enter(now_s + 3600)


def test_tokens_may_be_overdrawn_once_and_are_paid_back() -> None:
    account = Account("a", requests_per_minute=1000, tokens_per_minute=60)
    account.enter(0.0)
    account.charge(100)
    for now_s, left_s in ((0.0, 41), (30.0, 11)):
        with pytest.raises(Overloaded, match="tokens per minute; accepted: at most 60") as refused:
            account.enter(now_s)
        assert refused.value.retry_after_s == pytest.approx(left_s)
    account.enter(41.0)


async def test_prompts_and_answers_are_charged_and_refused_with_a_time(card: ModelCard) -> None:
    """Over REST and gRPC together: one account for both doors. Others are served all the while."""
    keys = [{"name": "a", "key": "alpha", "tokens_per_minute": 10}, {"name": "b", "key": "beta"}]
    async with facing(card, keys=keys) as face:
        async with client_of(face.state, "alpha") as client:
            asked = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 5, "ignore_eos": True}
            assert (await client.post("/v1/completions", json=asked)).status_code == 200
            refused = await client.post("/v1/completions", json=asked)
        alpha, beta = (("x-api-key", "alpha"),), (("x-api-key", "beta"),)
        status = await failure(face.inference.Generate(pb.GenerateRequest(text="x"), metadata=alpha))
        await face.inference.Generate(pb.GenerateRequest(text="x"), metadata=beta)
        assert len(face.engine.submissions) == 2
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "6")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert status.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 5 < details_of(status)["RetryInfo"].retry_delay.ToMilliseconds() / 1000 <= 6


async def test_a_call_in_flight_is_open_until_its_stream_ends(card: ModelCard) -> None:
    """One of team-b's at a time, at either door; however it ends, the next may come."""
    async with facing(card, keys=TEAMS) as face, client_of(face.state, "beta") as client:
        face.engine.hold_at = 1
        stream = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5, 6], "stream": True}))
        await until(lambda: face.state.ledger.num_open == 1)
        beta = (("x-api-key", "beta"),)
        assert (await client.post("/v1/completions", json={"prompt": [5]})).status_code == 429
        busy = await failure(face.inference.Generate(pb.GenerateRequest(text="x"), metadata=beta))
        assert busy.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.cancel()
        await asyncio.wait({stream})
        await until(lambda: face.state.ledger.num_open == 0)
        face.engine.go_on.set()
        face.engine.refusal = Overloaded("full")
        assert (await client.post("/v1/completions", json={"prompt": [5]})).status_code == 429
        face.engine.refusal = None
        await face.inference.Generate(pb.GenerateRequest(text="x"), metadata=beta)
        assert (await client.post("/v1/completions", json={"prompt": [5]})).status_code == 200


# What the configuration knows.


def test_only_hashes_are_kept_and_printed() -> None:
    named = {"name": "a", "key": "s3cret"}
    config = load_config(None, {"model": "m", "gateway.keys": [named], "gateway.admin_key": "r00t"})
    digest = "sha256:" + hashlib.sha256(b"s3cret").hexdigest()
    assert config.gateway.keys[0].key == digest
    for text in (config.to_yaml(), config.to_json(), repr(config)):
        assert digest in text
        assert "s3cret" not in text
        assert "r00t" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"api_key": ""},
            "gateway.api_key: accepted: 1 to 512 printable ASCII characters without spaces, or sha256:",
        ),
        ({"admin_key": "two words"}, "gateway.admin_key: accepted: 1 to 512"),
        ({"admin_key": "sha256:beef"}, "gateway.admin_key: accepted: 1 to 512"),
        ({"keys": [{"name": "a", "key": "zwölf"}]}, "gateway.keys.0.key: accepted: 1 to 512"),
        ({"keys": [{"name": "a"}]}, "gateway.keys.0.key: none given; accepted: a value"),
        ({"keys": [{"name": "a b", "key": "k"}]}, "gateway.keys.0.name: 'a b'"),
        (
            {"keys": [{"name": "a", "kee": "s3cret"}]},
            "gateway.keys.0.kee: unknown setting; the nearest known is 'key'",
        ),
        ({"keys": [{"name": "a", "key": "k", "in_flight_max": 0}]}, "gateway.keys.0.in_flight_max: 0; accepted:"),
        ({"keys": [{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]}, "the name 'a' is given twice"),
        (
            {"keys": [{"name": "a", "key": "k"}, {"name": "b", "key": "k"}]},
            "the key of 'a' and the key of 'b' are",
        ),
        (
            {"api_key": "k", "admin_key": hashed("k")},
            "api_key and admin_key are the same; accepted: keys that differ",
        ),
        ({"cors_origins": ["https://a/b"]}, "cors_origins has 'https://a/b'; accepted: * or scheme://host:port"),
        ({"tls_cert": "c.pem"}, "tls_key is null; accepted: a file, since tls_cert and tls_key go together"),
        ({"tls_client_ca": "ca.pem"}, "accepted: null, unless tls_cert is given"),
    ],
)
def test_settings_that_cannot_be_are_named_and_no_key_is_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, {"model": "m", **{f"gateway.{name}": value for name, value in settings.items()}})
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert "zwölf" not in str(refused.value)

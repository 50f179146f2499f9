"""The HTTP face without a socket: answers, errors in OpenAI's shape, keys, probes, metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from gateway.errors import NotReady, Overloaded
from gateway.model_card import ModelCard
from gateway.request import sibling_seed
from gateway.server import create_app
from gateway.state import GatewayState
from tests.unit.gateway_world import EchoEngine, card_of, said, state_of, write_checkpoint


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


@asynccontextmanager
async def gateway(
    card: ModelCard, **limits: Any
) -> AsyncIterator[tuple[GatewayState, EchoEngine, httpx.AsyncClient]]:
    state, engine = state_of(card, **limits)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield state, engine, client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error body; every one has OpenAI's four keys and no more."""
    (key,) = response.json()
    error: dict[str, Any] = response.json()[key]
    assert (key, set(error)) == ("error", {"message", "type", "param", "code"})
    assert isinstance(error["code"], str)
    return error


async def test_a_completion_is_openais(card: ModelCard) -> None:
    """Text, finish reason and usage; eos is counted and not shown."""
    async with gateway(card) as (_, _, client):
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hello"})
    assert card.tokens is not None
    length = len(card.tokens.encode("hello"))
    completion = Completion.model_validate(response.json(), strict=True)
    assert completion.choices[0].text == "hello"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (length, length + 1)
    assert completion.model == "tiny"


async def test_choices_are_numbered_over_prompts_and_n(card: ModelCard) -> None:
    """Two prompts of n=2 are choices 0 to 3, each with its own prompt and tokens."""
    body = {"prompt": [[5, 6], [7]], "n": 2, "return_token_ids": True, "max_tokens": 2, "ignore_eos": True}
    async with gateway(card) as (_, _, client):
        choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in choices] == [[5, 6], [5, 6], [7], [7]]
    assert [choice["token_ids"] for choice in choices] == [[5, 6], [5, 6], [7, min(card.eos)], [7, min(card.eos)]]
    assert {choice["finish_reason"] for choice in choices} == {"length"}


async def test_cached_tokens_are_those_that_no_choice_had_to_compute(card: ModelCard) -> None:
    """A prompt is billed once for its choices, so the fewest of them count; prompts of one call add up."""
    async with gateway(card) as (_, engine, client):
        for cached, n, expected in (({}, 1, 0), ({0: 4}, 1, 4), ({0: 2, 1: 4}, 2, 2), ({0: 0, 1: 4}, 2, 0)):
            engine.cached = cached
            answer = await client.post("/v1/completions", json={"prompt": [5, 6, 7, 8, 9], "n": n})
            usage = Completion.model_validate(answer.json(), strict=True).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (5, expected)
        engine.cached = {0: 2}
        answer = await client.post("/v1/completions", json={"prompt": [[5, 6, 7], [8, 9, 5]]})
        assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_the_seed_decides(card: ModelCard) -> None:
    """The same seed gives the same tokens; siblings have seeds of their own."""
    body = {
        "prompt": [5, 6, 7, 8],
        "seed": 11,
        "temperature": 1,
        "n": 2,
        "return_token_ids": True,
        "max_tokens": 4,
    }
    async with gateway(card) as (_, _, client):
        answers = [(await client.post("/v1/completions", json=body)).json() for _ in range(2)]
    tokens = [[choice["token_ids"] for choice in answer["choices"]] for answer in answers]
    seeds = [11, sibling_seed(11, 1)]
    assert tokens[0] == tokens[1] == [[said((5, 6, 7, 8), 1, seed, p, 0) for p in range(4)] for seed in seeds]


async def test_completion_logprobs_are_parallel_lists(card: ModelCard) -> None:
    assert card.tokens is not None
    prompt = card.tokens.encode("ab")
    body = {"prompt": prompt, "logprobs": 2, "max_tokens": 2}
    async with gateway(card) as (_, _, client):
        logprobs = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
        by_id = (await client.post("/v1/completions", json={**body, "return_tokens_as_token_ids": True})).json()
        plain = (await client.post("/v1/completions", json={**body, "logprobs": 0})).json()
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["token_logprobs"] == [-0.25, -0.5]
    assert logprobs["text_offset"] == [0, 1]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2]
    assert logprobs["top_logprobs"][0]["a"] == -0.25
    assert by_id["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in prompt]
    assert plain["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_streamed_completion_logprobs_are_the_whole_ones(card: ModelCard) -> None:
    """One entry per token, each at the place where its text begins, however its text is held back."""
    assert card.tokens is not None
    text = "aé🙂b STO p"
    prompt = card.tokens.encode(text)
    body = {"prompt": prompt, "logprobs": 1, "stop": "STOP"}
    async with gateway(card) as (_, _, client):
        whole = (await client.post("/v1/completions", json=body)).json()
        lines = (await client.post("/v1/completions", json={**body, "stream": True})).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    expected = Completion.model_validate(whole, strict=True).choices[0].logprobs
    assert expected is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [part for chunk in chunks for part in chunk["choices"][0]["logprobs"][name]]
        assert parts == getattr(expected, name)
    assert whole["choices"][0]["text"] == text
    places = [*(expected.text_offset or []), len(text)]
    for token, begin, end in zip(expected.tokens or [], places, places[1:], strict=False):
        assert begin == end or text[begin:end].endswith(token) or token.startswith("bytes:")


async def test_a_chat_answer_is_openais(card: ModelCard) -> None:
    """What the template wrote was the prompt; the echo brings it back without its special tokens."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1, "max_tokens": 4}
    async with gateway(card) as (_, engine, client):
        response = await client.post("/v1/chat/completions", json=body)
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    assert card.tokens is not None
    assert card.tokens.decode(list(engine.submissions[0].prompt)) == "user\nHi\nai"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    (entry, *_) = answer.choices[0].logprobs.content or []
    assert (entry.token, entry.bytes, entry.logprob) == ("]~!b[", list(b"]~!b["), -0.25)
    assert [top.logprob for top in entry.top_logprobs] == [-0.25]


async def test_a_stop_string_cuts_the_answer_and_the_bill(card: ModelCard) -> None:
    """Tokens after the one that completed it are neither shown nor counted, and the worker hears of it."""
    assert card.tokens is not None
    prompt = [card.tokens.encode(char)[0] for char in "abcdef"]
    async with gateway(card) as (_, engine, client):
        response = await client.post("/v1/completions", json={"prompt": prompt, "stop": ["cd"]})
    answer = response.json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("ab", "stop")
    assert answer["choices"][0]["stop_reason"] == "cd"
    assert answer["usage"]["completion_tokens"] == 4
    assert [finish[3] for finish in engine.finished] == [3]


async def test_a_checkpoint_without_a_tokenizer_serves_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    async with gateway(card_of(tmp_path)) as (_, _, client):
        good = await client.post(
            "/v1/completions", json={"prompt": [5, 6], "temperature": 0, "return_token_ids": True, "logprobs": 1}
        )
        bad = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert good.json()["choices"][0]["token_ids"] == [5, 6, 9]
    assert good.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:9"]
    assert (bad.status_code, error_of(bad)["code"]) == (400, "no_tokenizer")


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b'{"prompt": ', "application/json", 400, "invalid_json"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"x" * 2000 + b'"}', "application/json", 413, "request_too_large"),
        (b'{"prompt": "x", "model": "y"}', "application/json", 404, "model_not_found"),
        (b'{"prompt": "x", "max_tokens": 0}', "application/json", 400, "invalid_value"),
        (b'{"prompt": "x", "max_tokens": 9999}', "application/json", 400, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_bad_requests_have_a_status_and_openais_body(
    card: ModelCard, content: bytes, content_type: str, status: int, code: str, is_chunked: bool
) -> None:
    """Also where the body's length is not declared; and the gateway goes on."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    async with gateway(card, body_bytes_max=1024) as (state, _, client):
        headers = {"content-type": content_type}
        body = chunks() if is_chunked else content
        response = await client.post("/v1/completions", content=body, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        assert state.ledger.num_open == 0


async def test_unknown_paths_and_methods_have_openais_body_too(card: ModelCard) -> None:
    async with gateway(card) as (_, _, client):
        missing, wrong = await client.get("/v1/nothing"), await client.get("/v1/completions")
    assert (missing.status_code, error_of(missing)["message"]) == (404, "there is no /v1/nothing")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")


async def test_refusals_for_load_and_readiness_say_when_to_come_back(card: ModelCard) -> None:
    async with gateway(card) as (_, engine, client):
        engine.refusal = Overloaded("the queue is full", retry_after_s=2.4)
        busy = await client.post("/v1/completions", json={"prompt": [1], "stream": True})
        engine.refusal = NotReady("no worker", retry_after_s=1)
        early = await client.post("/v1/completions", json={"prompt": [1]})
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    assert error_of(busy)["type"] == "rate_limit_error"
    assert (early.status_code, early.headers["retry-after"], error_of(early)["code"]) == (503, "1", "not_ready")


async def test_a_worker_that_gives_up_is_a_500_that_is_not_retried(card: ModelCard) -> None:
    async with gateway(card) as (state, engine, client):
        engine.failure_at = 1
        response = await client.post("/v1/completions", json={"prompt": [5, 6], "n": 2})
        assert state.ledger.num_open == 0
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert error_of(response)["message"] == "no expert at <path>"


@pytest.mark.parametrize("is_accepted", [True, False])
async def test_a_timeout_ends_the_work_everywhere(card: ModelCard, is_accepted: bool) -> None:
    """An error, not a short answer that looks whole; in a stream after the tokens that came in time."""
    asked = {"prompt": [5, 6], "max_tokens": 50, "timeout": 0.1}
    async with gateway(card) as (state, engine, client):
        engine.hold_at = 1
        if not is_accepted:
            engine.accepts.clear()
        whole = await client.post("/v1/completions", json=asked)
        streamed = await client.post("/v1/completions", json=asked | {"stream": True})
        assert state.ledger.num_open == 0
        assert len(engine.cancelled) == 2
    assert (whole.status_code, error_of(whole)["code"]) == (504, "deadline_exceeded")
    assert error_of(whole)["message"] == "the request was not done within its 0.1 s"
    assert '"deadline_exceeded"' in streamed.text


async def test_a_timeout_beyond_the_bound_is_refused(card: ModelCard) -> None:
    async with gateway(card, request_s_max=60) as (_, _, client):
        answers = [await client.post("/v1/completions", json={"prompt": [5], "timeout": s}) for s in (61, 0)]
    assert [answer.status_code for answer in answers] == [400, 400]
    accepted = "timeout is 61.0; accepted: a number of seconds above 0 and at most 60"
    assert error_of(answers[0])["message"] == accepted


async def test_a_bug_shows_no_trace(card: ModelCard, caplog: pytest.LogCaptureFixture) -> None:
    """The client reads 'internal error'; the log has the rest."""
    async with gateway(card) as (state, _, client):
        state.status = None  # type: ignore[assignment]
        response = await client.get("/v1/admin/status")
    assert (response.status_code, error_of(response)["message"]) == (500, "internal error")
    assert "NoneType" in caplog.text


async def test_keys_come_as_bearer_or_x_api_key(card: ModelCard) -> None:
    async with gateway(card, api_key="sesam") as (_, _, client):
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer sesam"}, 200),
            ({"x-api-key": "sesam"}, 200),
            ({"authorization": "Bearer sesame"}, 401),
            ({"authorization": "Basic sesam"}, 401),
            ({"x-api-key": ""}, 401),
        ):
            assert (await client.get("/v1/models", headers=headers)).status_code == status
        assert (await client.post("/v1/completions", json={"prompt": [1]})).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200
        assert error_of(await client.get("/v1/models"))["code"] == "invalid_api_key"


async def test_a_call_keeps_the_name_its_client_gave_it(card: ModelCard) -> None:
    """Under both headers that clients look for; one that is no header value is replaced."""
    async with gateway(card) as (_, _, client):
        given = await client.get("/v1/nothing", headers={"x-request-id": "call-7"})
        wrong = await client.get("/health", headers={"x-request-id": "two words"})
    assert given.headers["x-request-id"] == given.headers["request-id"] == "call-7"
    assert len(wrong.headers["x-request-id"]) == 32


async def test_fields_nobody_reads_are_named_in_a_header(card: ModelCard) -> None:
    async with gateway(card) as (_, _, client):
        response = await client.post("/v1/completions", json={"prompt": [1], "metadata": "u", "a\r\nb: c": 1})
        clean = await client.post("/v1/completions", json={"prompt": [1]})
    assert response.headers["x-expertmesh-ignored-fields"] == "metadata, a??b??c"
    assert "x-expertmesh-ignored-fields" not in clean.headers


async def test_models_tell_their_context(card: ModelCard) -> None:
    """What workers hold, where that is less than the checkpoint allows."""
    async with gateway(card) as (_, engine, client):
        engine.model_len_max = 100
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/tiny")).json()
        missing = await client.get("/v1/models/a/b")
    assert listed == {"object": "list", "data": [one]}
    assert Model.model_validate(one, strict=True).id == "tiny"
    assert one["max_model_len"] == 100
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


async def test_probes_tell_alive_from_ready(card: ModelCard) -> None:
    """Alive at once, ready with the first worker, not ready while draining; new calls are then refused."""
    async with gateway(card) as (state, engine, client):
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        engine.not_ready = "no attention worker has joined yet"
        waiting = await client.get("/ready")
        engine.not_ready = ""
        state.is_draining = True
        draining = await client.post("/v1/completions", json={"prompt": [1]})
        assert (await client.get("/health")).status_code == 200
    assert (waiting.status_code, error_of(waiting)["message"]) == (503, "no attention worker has joined yet")
    assert (draining.status_code, error_of(draining)["message"]) == (503, "this gateway is draining")


async def test_status_and_version_are_passed_on(card: ModelCard) -> None:
    async with gateway(card) as (_, _, client):
        assert (await client.get("/v1/admin/status")).json() == {"workers": []}
        assert (await client.get("/version")).json() == {"version": "0.1.0"}


async def test_metrics_count_calls_and_tokens(card: ModelCard) -> None:
    async with gateway(card) as (_, _, client):
        await client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 2})
        await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 0})
        text = (await client.get("/metrics")).text
    for line in (
        'expertmesh_requests_total{endpoint="completions",outcome="ok"} 1.0',
        'expertmesh_requests_total{endpoint="completions",outcome="400"} 1.0',
        "expertmesh_requests_in_flight 0.0",
        "expertmesh_sequences_in_flight 0.0",
        "expertmesh_prompt_tokens_total 2.0",
        "expertmesh_generation_tokens_total 2.0",
        'expertmesh_time_to_first_token_seconds_count{endpoint="completions"} 1.0',
        'expertmesh_inter_token_latency_seconds_count{endpoint="completions"} 1.0',
    ):
        assert line in text


async def test_the_schema_names_the_fields(card: ModelCard) -> None:
    """/openapi.json describes the bodies although their validation is ours."""
    async with gateway(card) as (_, _, client):
        paths = (await client.get("/openapi.json")).json()["paths"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["top_p"]["description"] == "a number above 0 and at most 1"


async def test_large_prompts_are_read_off_the_loop(card: ModelCard) -> None:
    """The same answer; but a body of a megabyte does not stop everyone's streams while it is tokenised."""
    async with gateway(card) as (_, _, client):
        response = await client.post("/v1/completions", json={"prompt": "word " * 10_000})
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")

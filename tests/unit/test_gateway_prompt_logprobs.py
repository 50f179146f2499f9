"""Logprobs of a prompt, from workers to clients: each once, in order, before any token, for all choices."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import step_pb2
from openai.types import Completion

from gateway import wire
from gateway.config import GatewayConfig
from gateway.errors import GenerationFailed, MalformedMessage
from gateway.ledger import Generation, Ledger
from gateway.metrics import GatewayMetrics
from gateway.model_card import ModelCard
from gateway.request import GenerateRequest, PromptLogprob, Sampling, TokenDelta
from gateway.server import create_app
from tests.unit.gateway_world import EchoEngine, card_of, scored, state_of, write_checkpoint
from tests.unit.grpc_world import facing

PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


# --- the ledger ------------------------------------------------------------------------------------


def stage(**limits: Any) -> tuple[Ledger, EchoEngine]:
    engine = EchoEngine()
    engine.ledger = ledger = Ledger(engine, GatewayConfig(**limits), GatewayMetrics())
    return ledger, engine


def ask(**changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"max_tokens": 3, "stop_token_ids": frozenset({0}), "num_prompt_logprobs": 1}
    return GenerateRequest("r", PROMPT, Sampling(temperature=0, seed=7), **fields | changes)


def scores(first: int, count: int, attempt: int = 1) -> TokenDelta:
    found = tuple(scored(PROMPT[at], at, 1) for at in range(first, min(first + count, 5)))
    found += (found[-1],) * (first + count - 5)
    return TokenDelta("r", 0, attempt, 0, (), prompt_position=first, prompt_logprobs=found)


def silent(engine: EchoEngine) -> None:
    """The engine takes submissions and does nothing: the test plays the worker."""
    engine.hold_at = 0
    engine.scores = False


async def read(generation: Generation, count: int) -> list[TokenDelta]:
    return [(await anext(generation))[1] for _ in range(count)]


async def test_scores_are_taken_once_in_order_and_asked_for_from_there(card: ModelCard) -> None:
    """Twice, overlapping, late or from an attempt that is over: the client sees each once."""
    ledger, engine = stage(silence_s_max=2)
    silent(engine)
    generation = await ledger.open([ask()])
    assert engine.submissions[-1].num_prompt_logprobs == 1
    assert [s.score_from for s in engine.submissions[-1].siblings] == [1]
    assert ledger.deliver(scores(1, 2))
    assert ledger.deliver(scores(1, 2))
    assert ledger.deliver(scores(2, 2))
    (claim,) = ledger.claims()
    assert [s.score_from for s in claim.siblings] == [4]
    assert ledger.deliver(scores(4, 1))
    assert [s.score_from for s in ledger.claims()[0].siblings] == [0]
    taken = await read(generation, 3)
    assert [(d.prompt_position, len(d.prompt_logprobs)) for d in taken] == [(1, 2), (3, 1), (4, 1)]
    assert [p for d in taken for p in d.prompt_logprobs] == [scored(PROMPT[at], at, 1) for at in range(1, 5)]
    generation.close()


@pytest.mark.parametrize("early", ["scores", "tokens"])
async def test_a_gap_opens_the_next_attempt_where_scores_are_missing(early: str) -> None:
    ledger, engine = stage(silence_s_max=2)
    silent(engine)
    generation = await ledger.open([ask()])
    assert ledger.deliver(scores(1, 1))
    assert not ledger.deliver(scores(3, 2) if early == "scores" else TokenDelta("r", 0, 1, 0, (5,)))
    (sibling,) = engine.submissions[-1].siblings
    assert (sibling.attempt, sibling.score_from, sibling.accepted) == (2, 2, ())
    assert not ledger.deliver(scores(2, 3))  # of the attempt that was given up
    assert ledger.deliver(scores(2, 3, attempt=2))
    generation.close()


async def test_more_scores_than_the_prompt_has_tokens_fail_the_call() -> None:
    ledger, engine = stage(silence_s_max=2)
    silent(engine)
    generation = await ledger.open([ask()])
    assert not ledger.deliver(scores(1, 5))
    with pytest.raises(GenerationFailed, match="more tokens than the prompt has"):
        await anext(generation)


def test_scores_beside_tokens_or_of_the_first_token_are_no_message() -> None:
    score = step_pb2.PromptLogprob(logprob=-1.0, rank=2, top=[step_pb2.TopLogprob(token=3, logprob=-0.5)])
    good = step_pb2.TokenDelta(prompt_position=1, prompt_logprobs=[score])
    assert wire.delta(good).prompt_logprobs == (PromptLogprob(-1.0, 2, ((3, -0.5),)),)
    for wrong in ({"tokens": [7], "prompt_position": 1}, {}):
        with pytest.raises(MalformedMessage, match="logprobs of its prompt"):
            wire.delta(step_pb2.TokenDelta(prompt_logprobs=[score], **wrong))


# --- REST ------------------------------------------------------------------------------------------


async def posted(card: ModelCard, path: str, body: dict[str, Any], *deaths: int) -> tuple[Any, EchoEngine]:
    state, engine = state_of(card)
    engine.score_deaths = set(deaths)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [httpx.Response(200, text=line).json() for line in lines[:-1]], engine
    return response.json(), engine


def shown(card: ModelCard, prompt: tuple[int, ...], count: int) -> list[Any]:
    """As vLLM writes them."""
    assert card.tokens is not None
    expected: list[Any] = [None]
    for at, token in enumerate(prompt[1:], 1):
        score = scored(token, at, count)
        entries = [(token, score.logprob, 3), *((t, v, r) for r, (t, v) in enumerate(score.top, 1) if t != token)]
        expected.append(
            {str(t): {"logprob": v, "rank": r, "decoded_token": card.tokens.spelled([t])} for t, v, r in entries}
        )
    return expected


@pytest.mark.parametrize("deaths", [(), (1,), (2, 4)])
async def test_prompt_logprobs_are_vllms_whatever_dies(card: ModelCard, deaths: tuple[int, ...]) -> None:
    """In each choice of a completion, once in a chat's answer; only the first sequence brings them."""
    body = {"prompt": [5, 6, 7, 8, 9], "n": 3, "prompt_logprobs": 2, "max_tokens": 2, "logprobs": 1}
    answer, engine = await posted(card, "/v1/completions", body, *deaths)
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [shown(card, PROMPT, 2)] * 3
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [2, 2, 2]
    assert [s.score_from for s in engine.submissions[0].siblings] == [1, 0, 0]
    assert [s.siblings[0].score_from for s in engine.submissions[1:]] == list(deaths)
    Completion.model_validate(answer, strict=True)
    answer, engine = await posted(
        card,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0},
        *deaths,
    )
    assert answer["prompt_logprobs"] == shown(card, engine.submissions[0].prompt, 0)


async def test_a_prompt_of_one_token_has_none(card: ModelCard) -> None:
    answer, _ = await posted(card, "/v1/completions", {"prompt": [5], "prompt_logprobs": 2, "max_tokens": 1})
    assert answer["choices"][0]["prompt_logprobs"] == [None]


@pytest.mark.parametrize("max_tokens", [2, 0])
@pytest.mark.parametrize("prompt", ["fox 日", "x"])
async def test_an_echo_is_the_prompt_before_each_answer(card: ModelCard, prompt: str, max_tokens: int) -> None:
    """Text, tokens, logprobs and offsets as if all had been generated, but for the first token; streamed the same.
    Without an answer nothing is billed beyond the prompt."""
    assert card.tokens is not None
    ids = card.tokens.encode(prompt)
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "n": 2, "max_tokens": max_tokens, "ignore_eos": True}
    answer, _ = await posted(card, "/v1/completions", body)
    chunks, _ = await posted(card, "/v1/completions", {**body, "stream": True})
    plain, _ = await posted(card, "/v1/completions", {**body, "echo": False, "max_tokens": max_tokens or 1})
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    for choice, own in zip(answer["choices"], plain["choices"], strict=True):
        generated = own["logprobs"] if max_tokens else {name: [] for name in own["logprobs"]}
        lists, begin = choice["logprobs"], len(prompt)
        assert choice["text"] == prompt + (own["text"] if max_tokens else "")
        assert choice["finish_reason"] == "length"
        assert lists["tokens"][len(ids) :] == generated["tokens"]
        assert lists["token_logprobs"] == [
            None, *(-0.5 * at for at in range(1, len(ids))), *generated["token_logprobs"]
        ]  # fmt: skip
        assert lists["top_logprobs"][0] is None
        assert len(lists["top_logprobs"]) == len(ids) + max_tokens
        assert lists["text_offset"][len(ids) :] == [begin + offset for offset in generated["text_offset"]]
        spelled = [0, *(len(card.tokens.spelled(ids[: i + 1]).rstrip("\ufffd")) for i in range(len(ids) - 1))]
        assert lists["text_offset"][: len(ids)] == spelled
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [t for c in mine for t in c["logprobs"]["tokens"]] == lists["tokens"]
        assert [t for c in mine for t in c["logprobs"]["text_offset"]] == lists["text_offset"]
        assert mine[0]["text"] == prompt


async def test_an_echo_without_logprobs_asks_nothing_of_the_worker(card: ModelCard) -> None:
    answer, engine = await posted(card, "/v1/completions", {"prompt": "fox", "echo": True, "max_tokens": 1})
    assert answer["choices"][0]["text"].startswith("fox")
    assert answer["choices"][0]["logprobs"] is None
    assert engine.submissions[0].siblings[0].score_from == 0


# --- gRPC ------------------------------------------------------------------------------------------


async def test_over_grpc_scores_come_once_and_first(card: ModelCard) -> None:
    options = pb.GenerateOptions(n=2, prompt_logprobs=1, max_tokens=2, ignore_eos=True, allowed_token_ids=[3, 5],
                                 bad_words=["fox"])  # fmt: skip
    fields: dict[str, Any] = {"tokens": pb.TokenIds(ids=PROMPT), "options": options}
    async with facing(card) as face:
        whole = await face.inference.Generate(pb.GenerateRequest(**fields))
        first, *rest = [m async for m in face.inference.GenerateStream(pb.GenerateStreamRequest(**fields))]
        sampling = face.engine.submissions[0].sampling
    assert (sampling.allowed_token_ids, len(sampling.bad_words) > 0) == ((3, 5), True)
    assert list(first.prompt_logprobs) == list(whole.prompt_logprobs)
    assert not first.HasField("choice")
    assert not any(message.prompt_logprobs for message in rest)
    assert [(p.token_id, p.rank, p.top[0].token_id) for p in whole.prompt_logprobs] == [
        (token, 3, token + 2) for token in PROMPT[1:]
    ]

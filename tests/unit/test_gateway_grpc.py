"""The gRPC face over a real socket: answers, streams, and calls that end early in every way there is."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc.aio
import httpx
import pytest
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import inference_pb2_grpc

from gateway.bodies import ChatBody, CompletionBody
from gateway.model_card import ModelCard
from gateway.request import sibling_seed
from gateway.server import create_app
from tests.unit.gateway_world import card_of, said, until, write_checkpoint
from tests.unit.grpc_world import Face, end_of, facing, failure

LONG: dict[str, Any] = {
    "tokens": pb.TokenIds(ids=[5, 6]),
    "options": pb.GenerateOptions(max_tokens=200, ignore_eos=True),
}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), temperature=0.0))


async def streamed(face: Face, **fields: Any) -> list[pb.GenerateStreamResponse]:
    return [message async for message in face.inference.GenerateStream(pb.GenerateStreamRequest(**fields))]


async def test_an_answer_has_text_tokens_reason_and_usage(card: ModelCard) -> None:
    """eos is a token of the answer, counted, and not in its text."""
    assert card.tokens is not None
    ids = card.tokens.encode("hello")
    async with facing(card) as face:
        face.engine.cached = {0: 1}
        answer = await face.inference.Generate(pb.GenerateRequest(text="hello", model="tiny"))
    (choice,) = answer.choices
    assert (choice.text, choice.finish) == ("hello", pb.CHOICE_FINISH_STOP)
    assert list(choice.token_ids) == [*ids, min(card.eos)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(ids) + 1)
    assert answer.usage.cached_tokens == 1
    assert (answer.model, answer.request_id[:4]) == ("tiny", "gen-")


async def test_a_stream_says_every_position_once_and_ends_with_usage(card: ModelCard) -> None:
    """Two choices interleaved: each in order, without a gap; together what the unary call answers."""
    options = pb.GenerateOptions(n=2, seed=11, temperature=1.0, max_tokens=5, ignore_eos=True)
    async with facing(card) as face:
        *chunks, last = await streamed(face, request_id="r-1", text="hello", options=options)
        whole = await face.inference.Generate(pb.GenerateRequest(text="hello", options=options))
    assert {message.request_id for message in [*chunks, last]} == {"r-1"}
    assert not last.HasField("choice")
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [message.choice for message in chunks if message.choice.index == choice.index]
        positions = [chunk.position + i for chunk in mine for i in range(len(chunk.token_ids))]
        assert positions == list(range(5))
        assert [token for chunk in mine for token in chunk.token_ids] == list(choice.token_ids)
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert [chunk.finish for chunk in mine if chunk.finish] == [choice.finish] == [pb.CHOICE_FINISH_LENGTH]


async def test_both_faces_give_the_same_tokens_for_the_same_seed(card: ModelCard) -> None:
    asked = {"seed": -7, "temperature": 0.9, "top_p": 0.8, "top_k": 5, "n": 2, "max_tokens": 6, "logprobs": 1}
    async with facing(card) as face:
        app = httpx.ASGITransport(create_app(face.state))
        async with httpx.AsyncClient(transport=app, base_url="http://gateway") as client:
            body = {"prompt": [5, 6, 7, 8], "return_token_ids": True, **asked}
            rest = (await client.post("/v1/completions", json=body)).json()["choices"]
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6, 7, 8]), options=pb.GenerateOptions(**asked))
        ours = (await face.inference.Generate(request)).choices
        first, second = face.engine.submissions
    assert [list(choice.token_ids) for choice in ours] == [choice["token_ids"] for choice in rest]
    assert [choice.text for choice in ours] == [choice["text"] for choice in rest]
    assert [one.logprob for one in ours[0].logprobs] == rest[0]["logprobs"]["token_logprobs"]
    seed = sibling_seed(2**64 - 7, 1)
    assert list(ours[1].token_ids) == [said((5, 6, 7, 8), 0.9, seed, p, min(card.eos)) for p in range(5)]
    assert (first.sampling, first.stop_token_ids, first.max_tokens) == (
        second.sampling, second.stop_token_ids, second.max_tokens
    )  # fmt: skip


def test_options_have_rests_names_and_both_requests_the_same_fields() -> None:
    """One validator reads both, so a field it does not know would be ignored."""
    options = {field.name for field in pb.GenerateOptions.DESCRIPTOR.fields}
    assert options <= CompletionBody.model_fields.keys()
    assert options <= ChatBody.model_fields.keys()
    unary, stream = (kind.DESCRIPTOR.fields for kind in (pb.GenerateRequest, pb.GenerateStreamRequest))
    assert [(f.name, f.number, f.type) for f in unary] == [(f.name, f.number, f.type) for f in stream]


async def test_every_option_reaches_the_worker_as_rests_does(card: ModelCard) -> None:
    asked = {
        "min_p": 0.25, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5,
        "min_tokens": 2, "max_tokens": 4, "seed": 1, "cache_salt": "mine",
    }  # fmt: skip
    async with facing(card) as face:
        app = httpx.ASGITransport(create_app(face.state))
        async with httpx.AsyncClient(transport=app, base_url="http://gateway") as client:
            body = {"prompt": [5, 6], "logit_bias": {"5": -100, "7": 2.5}, **asked}
            (await client.post("/v1/completions", json=body)).raise_for_status()
        options = pb.GenerateOptions(logit_bias={5: -100.0, 7: 2.5}, **asked)
        await face.inference.Generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]), options=options))
        rest, ours = face.engine.submissions
    assert dataclasses.replace(rest, waited_s=ours.waited_s, time_left_s=ours.time_left_s) == dataclasses.replace(
        ours, request_id=rest.request_id
    )
    assert ours.cache_salt == "mine"
    assert (ours.sampling.min_p, ours.min_tokens, dict(ours.sampling.logit_bias)) == (0.25, 2, {5: -100.0, 7: 2.5})


async def test_a_conversation_is_rendered_and_its_logprobs_come(card: ModelCard) -> None:
    messages = [
        pb.ChatMessage(role="user", content="Hi"),
        pb.ChatMessage(role="assistant", content="Yes", reasoning_content="so"),
    ]
    request = pb.GenerateRequest(
        chat=pb.Conversation(messages=messages), options=pb.GenerateOptions(max_tokens=2, logprobs=2)
    )
    async with facing(card) as face:
        (choice,) = (await face.inference.Generate(request)).choices
        (submission,) = face.engine.submissions
    assert card.tokens is not None
    assert card.tokens.decode(list(submission.prompt)) == "user\nHi\nassistant\n<think>so</think>Yes\nai"
    assert [(one.logprob, len(one.top)) for one in choice.logprobs] == [(-0.25, 2), (-0.5, 2)]
    assert choice.logprobs[0].top[0].token_id == choice.token_ids[0]


async def test_a_stop_string_cuts_text_tokens_and_bill(card: ModelCard) -> None:
    assert card.tokens is not None
    ids = [card.tokens.encode(char)[0] for char in "abcdef"]
    options = pb.GenerateOptions(stop=["cd"])
    async with facing(card) as face:
        face.engine.hold_at = 4
        *chunks, last = await streamed(face, tokens=pb.TokenIds(ids=ids), options=options)
        assert [finish[3] for finish in face.engine.finished] == [3]
    assert "".join(message.choice.text for message in chunks) == "ab"
    assert chunks[-1].choice.stop_string == "cd"
    assert last.usage.completion_tokens == 4


async def test_text_becomes_tokens_and_text_again(card: ModelCard) -> None:
    """Special tokens by name; what is no token, or another model's, is refused as everywhere."""
    assert card.tokens is not None
    async with facing(card) as face:
        tokens = await face.inference.Tokenize(pb.TokenizeRequest(text="Grüße 🙂"))
        ids = [*tokens.tokens, min(card.eos)]
        text = await face.inference.Detokenize(pb.DetokenizeRequest(tokens=ids, model="tiny"))
        chat = pb.Conversation(messages=[pb.ChatMessage(role="user", content="Hi")])
        rendered = await face.inference.Tokenize(pb.TokenizeRequest(chat=chat))
        wrong = await failure(face.inference.Detokenize(pb.DetokenizeRequest(tokens=[5, 99999])))
        nothing = await failure(face.inference.Tokenize(pb.TokenizeRequest()))
        other = await failure(face.inference.Tokenize(pb.TokenizeRequest(text="x", model="other")))
    assert list(tokens.tokens) == card.tokens.encode("Grüße 🙂")
    assert (text.text, tokens.max_model_len) == ("Grüße 🙂[e~[", 256)
    assert card.tokens.decode(list(rendered.tokens)) == "user\nHi\nai"
    assert (wrong.details() or "").startswith("tokens[1] is 99999; accepted: a token id")
    assert nothing.details() == "prompt is not set; accepted: text or chat"
    assert other.code() == grpc.StatusCode.NOT_FOUND


async def test_models_are_the_served_one(card: ModelCard) -> None:
    async with facing(card) as face:
        face.engine.model_len_max = 100
        listed = await face.inference.ListModels(pb.ListModelsRequest())
        one = await face.inference.GetModel(pb.GetModelRequest(name="tiny"))
        error = await failure(face.inference.GetModel(pb.GetModelRequest(name="other")))
    assert list(listed.models) == [one.model]
    assert (one.model.name, one.model.max_model_len, one.model.fingerprint) == ("tiny", 100, "f00d")
    assert error.code() == grpc.StatusCode.NOT_FOUND


# --- ends ---------------------------------------------------------------------------------------


async def test_cancel_ends_a_stream_and_its_work(card: ModelCard) -> None:
    """Once Cancel is answered nothing of the call is left; its name is free again."""
    async with facing(card) as face:
        face.engine.hold_at = 3
        call = face.inference.GenerateStream(pb.GenerateStreamRequest(request_id="mine", **LONG))
        for _ in range(3):
            await call.read()
        await face.inference.Cancel(pb.CancelRequest(request_id="mine"))
        assert face.is_idle
        assert len(face.engine.cancelled) == 1
        assert await end_of(call) == grpc.StatusCode.CANCELLED
        error = await failure(face.inference.Cancel(pb.CancelRequest(request_id="mine")))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        face.engine.hold_at = None
        assert (
            await face.inference.Generate(pb.GenerateRequest(request_id="mine", text="a"))
        ).request_id == "mine"


async def test_cancel_ends_a_call_that_still_waits_to_be_accepted(card: ModelCard) -> None:
    async with facing(card) as face:
        face.engine.accepts.clear()
        call = face.inference.Generate(pb.GenerateRequest(request_id="queued", text="a"))
        await until(lambda: face.state.ledger.num_open == 1)
        await face.inference.Cancel(pb.CancelRequest(request_id="queued"))
        assert face.state.ledger.num_open == 0
        assert (await failure(call)).details() == "the call was cancelled by its request_id"


async def test_a_name_belongs_to_one_open_call(card: ModelCard) -> None:
    async with facing(card) as face:
        face.engine.hold_at = 1
        first = face.inference.GenerateStream(pb.GenerateStreamRequest(request_id="twin", **LONG))
        await first.read()
        error = await failure(face.inference.Generate(pb.GenerateRequest(request_id="twin", text="a")))
        face.engine.go_on.set()
        assert await end_of(first) == grpc.StatusCode.OK
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("is_accepted", [True, False])
async def test_a_deadline_ends_the_work_everywhere(card: ModelCard, is_streamed: bool, is_accepted: bool) -> None:
    async with facing(card) as face:
        face.engine.hold_at = 1
        if not is_accepted:
            face.engine.accepts.clear()
        if is_streamed:
            code = await end_of(face.inference.GenerateStream(pb.GenerateStreamRequest(**LONG), timeout=0.15))
        else:
            code = (await failure(face.inference.Generate(pb.GenerateRequest(**LONG), timeout=0.15))).code()
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert all(0 < submission.time_left_s <= 0.15 for submission in face.engine.submissions)
        await until(lambda: face.is_idle and bool(face.engine.cancelled))


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_client_that_hangs_up_leaves_no_work(card: ModelCard, is_streamed: bool) -> None:
    async with facing(card) as face:
        face.engine.hold_at = 1
        if is_streamed:
            call = face.inference.GenerateStream(pb.GenerateStreamRequest(**LONG))
            await call.read()
        else:
            call = face.inference.Generate(pb.GenerateRequest(**LONG))
            await until(lambda: face.engine.num_running == 1)
        call.cancel()
        await until(lambda: face.is_idle and bool(face.engine.cancelled))


async def test_a_lost_connection_leaves_no_work(card: ModelCard) -> None:
    async with facing(card) as face:
        face.engine.hold_at = 1
        channel = grpc.aio.insecure_channel(face.address)
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateStreamRequest(**LONG))
        await call.read()
        await channel.close()
        await until(lambda: face.is_idle and bool(face.engine.cancelled))


async def test_a_client_that_does_not_read_counts_as_gone(card: ModelCard) -> None:
    """Its socket full, its call ends although tokens are left to say."""
    narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    options = pb.GenerateOptions(n=64, max_tokens=100, logprobs=20, ignore_eos=True)
    async with facing(card, client_stall_s_max=0.2) as face:
        face.engine.hold_at = 99
        async with grpc.aio.insecure_channel(face.address, options=narrow) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.GenerateStream(pb.GenerateStreamRequest(tokens=pb.TokenIds(ids=[5]), options=options))
            await until(lambda: face.engine.num_running == 64)
            await until(lambda: face.is_idle)
            assert len(face.engine.cancelled) == 1
            assert await end_of(call) == grpc.StatusCode.CANCELLED


async def test_a_draining_gateway_finishes_what_runs(card: ModelCard) -> None:
    """New calls are refused, the stream goes on to its end, and the port is free afterwards."""
    async with facing(card) as face:
        face.engine.hold_at = 1
        running = asyncio.create_task(streamed(face, **LONG))
        await until(lambda: face.engine.num_running == 1)
        face.state.is_draining = True
        refused = await failure(face.inference.Generate(pb.GenerateRequest(text="a")))
        stopping = asyncio.create_task(face.server.stop(5.0))
        face.engine.go_on.set()
        assert (await running)[-1].usage.completion_tokens == 200
        await stopping
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", face.server.port)
    assert refused.code() == grpc.StatusCode.UNAVAILABLE
    assert refused.details() == "this gateway is draining"


async def test_a_call_that_is_cancelled_while_it_begins_to_stream_is_told(card: ModelCard) -> None:
    """At whatever moment: headers that were cut off would be sent again with the status, and then neither."""
    async with facing(card) as face:

        async def stream() -> grpc.StatusCode:
            request = pb.GenerateStreamRequest(tokens=pb.TokenIds(ids=[5, 6]), request_id="one")
            return await end_of(face.inference.GenerateStream(request))

        async def cancel() -> grpc.StatusCode:
            code: grpc.StatusCode = await face.inference.Cancel(pb.CancelRequest(request_id="one")).code()
            return code

        for _ in range(40):
            async with asyncio.timeout(30):
                codes = await asyncio.gather(stream(), cancel(), stream(), cancel(), cancel())
            assert {code.name for code in codes} <= {"OK", "CANCELLED", "ALREADY_EXISTS", "NOT_FOUND"}
        assert face.is_idle

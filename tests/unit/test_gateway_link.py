"""The gateway's stream to the scheduler over real gRPC: what it says, what it obeys, what it survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from expertmesh.v1 import schedule_pb2

from gateway.errors import GenerationFailed, NotReady, Overloaded, TooLarge
from gateway.request import FinishReason, TokenDelta
from tests.unit.gateway_link_world import FINGERPRINT, TOKEN, Order, Stage, ask, attempt, staged
from tests.unit.gateway_world import until


def rejected(code: schedule_pb2.RejectCode, retry_after_s: float = 0.0) -> Callable[[schedule_pb2.Submit], Order]:
    return lambda submit: Order(
        rejected=schedule_pb2.Rejected(
            request_id=submit.request_id, code=code, message="because", retry_after_s=retry_after_s
        )
    )


def closed(number: int, reason: schedule_pb2.CloseReason) -> Order:
    return Order(closed=schedule_pb2.AttemptClosed(attempt=attempt(number), reason=reason))


async def test_a_submission_carries_everything_once() -> None:
    """Hello first, identity in every message, the token as a bearer; all parameters as they were."""
    async with staged() as stage:
        generation = await stage.ledger.open([ask(n=2)])
        hello, said = stage.scheduler.heard
        submit = said.submit
        assert hello.hello.token_address == stage.identity.token_address
        assert (hello.term, said.term) == (0, 1)
        assert {(m.sender.id, m.sender.number, m.fingerprint) for m in (hello, said)} == {
            ("gateway-0", 4, FINGERPRINT)
        }
        assert stage.scheduler.metadata[0]["authorization"] == f"Bearer {TOKEN}"
        assert (submit.request_id, list(submit.prompt), submit.resume) == ("r", [1, 2, 3], False)
        sampling = submit.spec.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
        assert (list(submit.spec.stop_token_ids), submit.spec.max_tokens) == ([5, 7], 9)
        assert (submit.spec.HasField("num_logprobs"), submit.spec.num_logprobs) == (True, 0)
        assert [(s.index, s.attempt, list(s.accepted)) for s in submit.siblings] == [(0, 1, []), (1, 1, [])]
        assert submit.siblings[0].seed == 2**64 - 1
        generation.close()
        await until(lambda: stage.scheduler.heard[-1].cancel.request_id == "r")


async def test_finish_names_attempt_and_position() -> None:
    async with staged() as stage:
        generation = await stage.ledger.open([ask()])
        generation.finish(0, 4)
        await until(lambda: stage.scheduler.heard[-1].HasField("finish"))
        finish = stage.scheduler.heard[-1].finish
    assert (finish.attempt, finish.position) == (attempt(), 4)


@pytest.mark.parametrize(
    ("code", "error", "retry_after_s"),
    [
        (schedule_pb2.REJECT_CODE_OVERLOADED, Overloaded, 2.5),
        (schedule_pb2.REJECT_CODE_NOT_READY, NotReady, 2.5),
        (schedule_pb2.REJECT_CODE_WRONG_MODEL, NotReady, 2.5),
        (schedule_pb2.REJECT_CODE_TOO_LARGE, TooLarge, None),
    ],
)
async def test_a_rejection_becomes_the_clients_error(
    code: schedule_pb2.RejectCode, error: type[Exception], retry_after_s: float | None
) -> None:
    async with staged() as stage:
        stage.scheduler.answer = rejected(code, 2.5)
        with pytest.raises(error, match="because") as caught:
            await stage.ledger.open([ask()])
        assert getattr(caught.value, "retry_after_s", None) == retry_after_s
        assert stage.ledger.num_open == 0


async def test_readiness_follows_the_scheduler_and_its_workers() -> None:
    """Not before its welcome, nor before a worker has joined; and why is said."""
    stage = Stage()
    assert stage.link.not_ready == "the scheduler has not been reached yet"
    with pytest.raises(NotReady, match="has not been reached"):
        await stage.ledger.open([ask()])
    stage.scheduler.model_len_max = 0
    await stage.scheduler.start()
    stage.link.start(stage.ledger)
    await until(lambda: stage.link.not_ready == "no attention worker has joined yet")
    stage.scheduler.say(Order(welcome=schedule_pb2.Welcome(model_len_max=64)))
    await until(lambda: stage.link.not_ready == "")
    assert stage.link.model_len_max == 64
    await stage.scheduler.stop()
    await until(lambda: stage.link.not_ready == "the scheduler cannot be reached (UNAVAILABLE)")
    await stage.link.stop()


async def test_a_scheduler_that_has_begun_anew_and_knows_no_worker_yet_is_given_requests_all_the_same() -> None:
    """It queues them until its workers are back: nobody is refused for its restart."""
    async with staged() as stage:
        stage.scheduler.say(Order(welcome=schedule_pb2.Welcome(model_len_max=0)))
        await until(lambda: stage.link.not_ready == "no attention worker has joined yet")
        assert stage.link.model_len_max == 128
        await stage.ledger.open([ask()])
        assert len(stage.scheduler.submits()) == 1


async def test_a_closed_attempt_is_followed_by_the_next() -> None:
    """With the tokens accepted so far; a failed one ends at the client."""
    async with staged() as stage:
        generation = await stage.ledger.open([ask()])
        stage.ledger.deliver(TokenDelta("r", 0, 1, 0, (4, 6)))
        stage.scheduler.say(closed(1, schedule_pb2.CLOSE_REASON_WORKER_LOST))
        await until(lambda: len(stage.scheduler.submits()) == 2)
        resume = stage.scheduler.submits()[1]
        assert resume.resume
        assert [(s.attempt, list(s.accepted)) for s in resume.siblings] == [(2, [4, 6])]
        stage.scheduler.say(closed(2, schedule_pb2.CLOSE_REASON_FAILED))
        assert (await anext(generation))[1].tokens == (4, 6)
        with pytest.raises(GenerationFailed):
            await anext(generation)


async def test_a_rejected_resume_ends_at_the_client() -> None:
    async with staged() as stage:
        generation = await stage.ledger.open([ask()])
        stage.scheduler.answer = rejected(schedule_pb2.REJECT_CODE_TOO_LARGE)
        stage.scheduler.say(closed(1, schedule_pb2.CLOSE_REASON_PREEMPTED))
        with pytest.raises(TooLarge):
            await anext(generation)


async def test_a_new_scheduler_hears_of_all_that_is_in_flight() -> None:
    """Current attempts with their tokens, as resumes; what was never answered, too; nothing that is over."""
    async with staged() as stage:
        running, over = await stage.ledger.open([ask("running", n=2)]), await stage.ledger.open([ask("over")])
        over.close()
        stage.ledger.deliver(TokenDelta("running", 1, 1, 0, (4,), finish=FinishReason.STOP))
        stage.ledger.deliver(TokenDelta("running", 0, 1, 0, (8,)))
        stage.scheduler.answer = lambda _submit: None
        asking = asyncio.create_task(stage.ledger.open([ask("unanswered")]))
        await until(lambda: len(stage.scheduler.submits()) == 3)
        await stage.restart()
        await asking
        await until(lambda: len(stage.scheduler.submits()) == 2)
        said = {s.request_id: s for s in stage.scheduler.submits()}
        assert set(said) == {"running", "unanswered"}
        assert all(submit.resume for submit in said.values())
        assert [(s.index, s.attempt, list(s.accepted)) for s in said["running"].siblings] == [(0, 1, [8])]
        assert stage.scheduler.heard[0].term == 1  # the newest it had seen
        running.close()


async def test_claims_are_said_in_parts_that_the_scheduler_takes() -> None:
    """A request's accepted tokens grow: all its siblings in one message may be more than any link takes."""
    async with staged(submit_bytes_max=1024) as stage:
        request = replace(ask(n=5), max_tokens=300)
        running = await stage.ledger.open([request])
        for index in range(5):
            assert stage.ledger.deliver(TokenDelta("r", index, 1, 0, tuple(range(200))))
        await stage.restart()
        await until(lambda: sum(len(submit.siblings) for submit in stage.scheduler.submits()) == 5)
        said = stage.scheduler.submits()
        assert [len(submit.siblings) for submit in said] == [3, 2]
        assert all(submit.resume and submit.ByteSize() <= 1024 for submit in said)
        assert {tuple(submit.prompt) for submit in said} == {request.prompt}
        assert [s.index for submit in said for s in submit.siblings] == [0, 1, 2, 3, 4]
        assert all(len(s.accepted) == 200 for submit in said for s in submit.siblings)
        running.close()


async def test_a_sequence_no_message_can_carry_ends_with_the_reason() -> None:
    """Said anyway, it would end the stream of all the others, again and again."""
    async with staged(submit_bytes_max=1024) as stage:
        running = await stage.ledger.open([replace(ask(), max_tokens=3000), ask("small")])
        assert stage.ledger.deliver(TokenDelta("r", 0, 1, 0, tuple(range(2000))))
        await stage.restart()
        await until(lambda: [submit.request_id for submit in stage.scheduler.submits()] == ["small"])
        with pytest.raises(TooLarge, match=r"2003 tokens take \d+ bytes; .* 1024 \(gateway.submit_bytes_max\)"):
            async for _ in running:
                pass
        running.close()
        with pytest.raises(TooLarge):
            await stage.ledger.open([replace(ask("huge"), prompt=tuple(range(2000)))])


async def test_an_attempt_lost_without_a_scheduler_is_resumed_by_the_next() -> None:
    """The closing itself needs no stream: the claim carries the new attempt."""
    async with staged() as stage:
        await stage.ledger.open([ask()])
        await stage.scheduler.stop()
        await until(lambda: bool(stage.link.not_ready))
        assert not stage.ledger.deliver(TokenDelta("r", 0, 1, 1, (4,)))  # a gap
        await stage.restart()
        await until(lambda: len(stage.scheduler.submits()) == 1)
        assert stage.scheduler.submits()[0].siblings[0].attempt == 2


async def test_a_scheduler_that_does_not_answer_is_a_bounded_wait() -> None:
    """The call is refused, and withdrawn in case it was heard after all."""
    async with staged(submit_timeout_s=0.02) as stage:
        stage.scheduler.answer = lambda _submit: None
        with pytest.raises(NotReady, match=r"did not answer within 0.02 s"):
            await stage.ledger.open([ask()])
        await until(lambda: stage.scheduler.heard[-1].cancel.request_id == "r")


async def test_a_scheduler_that_does_not_welcome_is_a_bounded_wait() -> None:
    async with staged(connect_timeout_s=0.05) as stage:
        await stage.restart(welcomes=False)
        await until(lambda: stage.link.not_ready == "the scheduler did not welcome this gateway in time")


@pytest.mark.parametrize(
    ("changes", "label", "why"),
    [
        ({"term": 1}, "term", "the scheduler has term 1, the newest seen is 2"),
        ({"fingerprint": "beef"}, "fingerprint", "the scheduler serves checkpoint beef, this gateway f00d"),
    ],
)
async def test_orders_that_are_not_for_us_are_refused(changes: dict[str, Any], label: str, why: str) -> None:
    """An older term or another checkpoint: counted, not obeyed, and the next hello says what is current."""
    async with staged() as stage:
        await stage.restart()
        await until(lambda: not stage.link.not_ready)
        await stage.restart(**changes)
        await until(lambda: why in stage.link.not_ready)
        count = stage.metrics.registry.get_sample_value
        assert (count("expertmesh_scheduler_orders_refused_total", {"reason": label}) or 0) >= 1
        assert stage.scheduler.heard[0].term == 2


async def test_a_full_queue_begins_the_stream_anew() -> None:
    """A scheduler that does not read costs bounded memory; it hears the claims when it is back."""
    async with staged(link_queue_max=16) as stage:
        await stage.ledger.open([ask()])
        for number in range(17):
            stage.link.cancel(f"other-{number}")
        await until(lambda: stage.scheduler.submits()[-1].resume)
        assert len(stage.scheduler.metadata) == 2

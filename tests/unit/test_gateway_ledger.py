"""Each request's truth: tokens taken once, in order, from the newest attempt only, whatever dies."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import GatewayConfig
from gateway.errors import DeadlinePassed, GenerationFailed, NotReady, Overloaded
from gateway.ledger import Generation, Ledger
from gateway.metrics import GatewayMetrics
from gateway.port import CloseReason
from gateway.request import FinishReason, GenerateRequest, Sampling, TokenDelta, sibling_seed
from tests.one_loop import run
from tests.unit.gateway_world import EchoEngine, said, settled

PROMPT = (5, 6, 7, 8, 9)


def stage(**limits: Any) -> tuple[Ledger, EchoEngine]:
    engine = EchoEngine()
    engine.ledger = ledger = Ledger(engine, GatewayConfig(**limits), GatewayMetrics())
    return ledger, engine


def ask(name: str = "r", **changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "sampling": Sampling(temperature=0, seed=7),
        "max_tokens": 12,
        "stop_token_ids": frozenset({0}),
    }
    return GenerateRequest(request_id=name, prompt=PROMPT, **{**fields, **changes})


def silent(engine: EchoEngine) -> None:
    """The engine takes submissions and does nothing: the test plays the worker."""
    engine.hold_at = 0


def delta(position: int, *tokens: int, attempt: int = 1, **more: Any) -> TokenDelta:
    return TokenDelta("r", 0, attempt, position, tokens, **more)


async def collect(generation: Generation) -> dict[int, list[int]]:
    choices: dict[int, list[int]] = {}
    async for choice, part in generation:
        choices.setdefault(choice, []).extend(part.tokens)
    return choices


async def test_a_resume_that_began_anew_says_what_it_found_cached() -> None:
    """With its first token; what is taken again of a delta from its middle says nothing."""
    assert delta(0, 5, 6, num_cached=3).since(0).num_cached == 3
    assert delta(0, 5, 6, num_cached=3).since(1).num_cached == 0
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask()])
    ledger.close_attempt("r", 0, 1, CloseReason.WORKER_LOST, "killed")
    ledger.deliver(delta(0, 5, attempt=2, num_cached=4))
    assert [part.num_cached async for _, part in _first(generation)] == [4]
    generation.close()


async def _first(generation: Generation) -> Any:
    yield await anext(generation)


async def test_sequences_of_a_call_are_numbered_over_its_requests() -> None:
    """Two prompts with n=2 are choices 0 to 3; each brings its prompt again, and eos."""
    ledger, _ = stage()
    generation = await ledger.open([ask("a", n=2), ask("b", n=2)])
    assert await collect(generation) == {choice: [*PROMPT, 0] for choice in range(4)}
    assert ledger.num_open == 0


async def test_siblings_sample_with_their_own_seeds() -> None:
    """Sequence 0 is what n=1 would have brought; the others follow from (seed, index)."""
    ledger, engine = stage()
    request = ask(n=3, sampling=Sampling(temperature=1, seed=7), stop_token_ids=frozenset())
    choices = await collect(await ledger.open([request]))
    assert [s.seed for s in engine.submissions[0].siblings] == [7, sibling_seed(7, 1), sibling_seed(7, 2)]
    assert choices[0] == [said(PROMPT, 1, 7, position, 0) for position in range(12)]
    assert len({tuple(tokens) for tokens in choices.values()}) == 3


def test_a_siblings_seed_is_the_documented_hash() -> None:
    """Other programs may compute it: BLAKE2b over two little-endian words."""
    digest = hashlib.blake2b(struct.pack("<QQ", 2**64 - 1, 3), digest_size=8).digest()
    assert sibling_seed(2**64 - 1, 3) == int.from_bytes(digest, "little")
    assert sibling_seed(11, 0) == 11


@pytest.mark.parametrize("deaths", [{0}, {3}, {0, 1, 2}, {5}])
async def test_a_lost_worker_changes_no_token(deaths: set[int]) -> None:
    """Accepted tokens are given to the next attempt; a dead worker's late token is refused."""
    ledger, engine = stage()
    engine.deaths = set(deaths)
    request = ask(sampling=Sampling(temperature=1, seed=3), max_tokens=9)
    tokens = (await collect(await ledger.open([request])))[0]
    expected = [said(PROMPT, 1, 3, position, 0) for position in range(9)]
    assert tokens == expected[: expected.index(0) + 1]
    assert engine.num_refused == len(deaths)
    resumes = engine.submissions[1:]
    assert [s.siblings[0].attempt for s in resumes] == list(range(2, 2 + len(deaths)))
    assert all(
        s.resume and s.siblings[0].accepted == tuple(expected[:at])
        for s, at in zip(resumes, sorted(deaths), strict=True)
    )


async def test_duplicates_are_dropped_and_overlaps_trimmed() -> None:
    """A position reaches the client once (rule 4), with the logprob that came with it."""
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask()])
    assert ledger.deliver(delta(0, 1, 2, logprobs=(-1.0, -2.0)))
    assert ledger.deliver(delta(0, 1, 2, logprobs=(-1.0, -2.0)))
    assert ledger.deliver(delta(1, 2, 3, logprobs=(-2.0, -3.0), finish=FinishReason.STOP))
    parts = [part async for _, part in generation]
    assert [(part.position, part.tokens, part.logprobs) for part in parts] == [
        (0, (1, 2), (-1.0, -2.0)),
        (2, (3,), (-3.0,)),
    ]


async def test_an_older_attempt_is_refused() -> None:
    """What a frozen worker says after its sequence moved on is not wanted."""
    ledger, engine = stage()
    silent(engine)
    await ledger.open([ask()])
    ledger.close_attempt("r", 0, 1, CloseReason.PREEMPTED, "")
    assert not ledger.deliver(delta(0, 1, attempt=1))
    assert ledger.deliver(delta(0, 1, attempt=2))
    ledger.close_attempt("r", 0, 1, CloseReason.FAILED, "old news")
    assert ledger.deliver(delta(1, 2, attempt=2))


async def test_a_gap_is_refused_and_the_next_attempt_goes_on_from_what_is_held() -> None:
    """Lost tokens cannot be skipped: the worker is told off and the sequence placed again."""
    ledger, engine = stage()
    silent(engine)
    await ledger.open([ask()])
    assert ledger.deliver(delta(0, 1))
    assert not ledger.deliver(delta(2, 3))
    assert engine.submissions[-1].siblings[0].accepted == (1,)
    assert engine.submissions[-1].siblings[0].attempt == 2
    assert ledger.deliver(delta(1, 2, attempt=2))


async def test_unknown_and_finished_sequences_are_refused() -> None:
    ledger, engine = stage()
    silent(engine)
    assert not ledger.deliver(delta(0, 1))
    await ledger.open([ask()])
    assert ledger.deliver(delta(0, 1, finish=FinishReason.STOP))
    assert not ledger.deliver(delta(1, 2))


async def test_a_resume_that_was_over_ends_without_a_token() -> None:
    """A worker that is given a finished sequence says so with an empty last delta."""
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask()])
    ledger.deliver(delta(0, 1))
    ledger.close_attempt("r", 0, 1, CloseReason.WORKER_LOST, "")
    assert ledger.deliver(delta(1, attempt=2, finish=FinishReason.STOP))
    assert [part.finish for _, part in [item async for item in generation]] == [None, FinishReason.STOP]


async def test_max_tokens_is_the_end_whoever_forgets_to_say_so() -> None:
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask(max_tokens=2)])
    ledger.deliver(delta(0, 1, 2))
    assert [part.finish async for _, part in generation] == [FinishReason.LENGTH]


async def test_more_tokens_than_asked_for_fail_the_sequence() -> None:
    """What one request may hold in memory is bounded by its own max_tokens."""
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask(max_tokens=2)])
    assert not ledger.deliver(delta(0, 1, 2, 3))
    with pytest.raises(GenerationFailed, match="more tokens"):
        await collect(generation)


async def test_attempts_are_bounded() -> None:
    """A request that kills every worker ends with an error that names the bound."""
    ledger, engine = stage(attempts_max=3)
    silent(engine)
    generation = await ledger.open([ask()])
    for attempt in (1, 2, 3):
        ledger.close_attempt("r", 0, attempt, CloseReason.WORKER_LOST, "")
    with pytest.raises(GenerationFailed, match=r"placed 3 times \(attempts_max\)"):
        await collect(generation)


async def test_a_failed_attempt_ends_the_call_with_a_presentable_reason() -> None:
    """The client reads why, without paths or a second line."""
    ledger, engine = stage()
    engine.failure_at = 2
    generation = await ledger.open([ask()])
    with pytest.raises(GenerationFailed) as caught:
        await collect(generation)
    assert caught.value.message == "no expert at <path>"


async def test_closing_cancels_what_is_open_and_is_idempotent() -> None:
    """A client that hangs up leaves nothing running."""
    ledger, engine = stage()
    engine.hold_at = 1
    generation = await ledger.open([ask("a", n=2), ask("b")])
    await settled()
    generation.close()
    generation.close()
    await settled()
    assert engine.cancelled == ["a", "b"]
    assert (ledger.num_open, engine.num_running) == (0, 0)


async def test_finish_drops_the_surplus_and_tells_the_scheduler_where() -> None:
    """After a stop string nothing more of that choice comes; its sibling goes on."""
    ledger, engine = stage()
    generation = await ledger.open([ask(n=2)])
    await settled()
    seen: list[tuple[int, int]] = []
    async for choice, part in generation:
        seen.append((choice, part.position))
        if (choice, part.position) == (0, 1):
            generation.finish(0, 1)
    assert [p for c, p in seen if c == 0] == [0, 1]
    assert [p for c, p in seen if c == 1] == list(range(len(PROMPT) + 1))
    assert engine.finished == []  # its end had come meanwhile


async def test_finish_reaches_a_worker_that_still_runs() -> None:
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask()])
    ledger.deliver(delta(0, 1, 2))
    await anext(generation)
    generation.finish(0, 0)
    assert engine.finished == [("r", 0, 1, 0)]
    assert not ledger.deliver(delta(2, 3))
    assert [item async for item in generation] == []


async def test_a_refused_call_leaves_nothing_behind() -> None:
    ledger, engine = stage()
    engine.refusal = Overloaded("full", retry_after_s=3)
    with pytest.raises(Overloaded):
        await ledger.open([ask("a"), ask("b")])
    assert ledger.num_open == 0


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    """Hanging up while the scheduler has not answered cancels there, too."""
    ledger, engine = stage()
    engine.accepts.clear()
    opening = asyncio.create_task(ledger.open([ask()]))
    await settled()
    opening.cancel()
    await asyncio.wait({opening})
    assert (ledger.num_open, engine.cancelled) == (0, ["r"])


async def test_the_gateway_refuses_beyond_its_own_bound() -> None:
    ledger, engine = stage(in_flight_max=3)
    silent(engine)
    await ledger.open([ask("a", n=2)])
    with pytest.raises(Overloaded, match="at most 3"):
        await ledger.open([ask("b", n=2)])
    await ledger.open([ask("c")])


async def test_silence_is_bounded() -> None:
    ledger, engine = stage(silence_s_max=0.01)
    silent(engine)
    generation = await ledger.open([ask()])
    with pytest.raises(NotReady, match=r"no token came for 0.01 s"):
        await collect(generation)


async def test_a_timer_a_hair_early_is_a_deadline_all_the_same() -> None:
    """The loop's timers keep to its clock's resolution, so that the ledger's own clock may not be there yet."""
    engine = EchoEngine()
    engine.ledger = ledger = Ledger(engine, GatewayConfig(), GatewayMetrics(), clock=lambda: 0.0)
    silent(engine)
    generation = await ledger.open([ask(time_s=0.01)])
    with pytest.raises(DeadlinePassed, match=r"within its 0.01 s"):
        await collect(generation)


async def test_claims_are_what_is_unfinished() -> None:
    """A scheduler that comes back hears of every open sequence, its attempt and its accepted tokens."""
    ledger, engine = stage()
    silent(engine)
    await ledger.open([ask("r", n=2)])
    ledger.deliver(delta(0, 1))
    ledger.close_attempt("r", 0, 1, CloseReason.WORKER_LOST, "")
    ledger.deliver(TokenDelta("r", 1, 1, 0, (4,), finish=FinishReason.STOP))
    engine.accepts.clear()
    waiting = asyncio.create_task(ledger.open([ask("late")]))
    await settled()
    claim, late = ledger.claims()
    assert (claim.request_id, late.request_id) == ("r", "late")
    assert claim.resume
    assert late.resume
    assert [(s.index, s.attempt, s.accepted) for s in claim.siblings] == [(0, 2, (1,))]
    waiting.cancel()


@given(st.data())
def test_any_history_streams_the_same_tokens_once(data: st.DataObject) -> None:
    """Whatever is split, repeated, late or lost, the client reads the sequence, each position once."""
    tokens = [10 + i for i in range(12)]

    async def history() -> list[int]:
        ledger, engine = stage(attempts_max=1000)
        silent(engine)
        generation = await ledger.open([ask(max_tokens=12, stop_token_ids=frozenset())])
        while ledger.num_open:
            sibling = engine.submissions[-1].siblings[0]
            held = len(ledger.claims()[0].siblings[0].accepted)
            act = data.draw(st.sampled_from(["next", "again", "stale", "lost", "gap"]))
            begin = data.draw(st.integers(0, held)) if act == "again" else held + (act == "gap")
            part = tokens[begin : begin + data.draw(st.integers(1, 4))]
            attempt = sibling.attempt - 1 if act == "stale" else sibling.attempt
            if act == "lost":
                ledger.close_attempt("r", 0, attempt, CloseReason.WORKER_LOST, "")
            else:
                ledger.deliver(delta(begin, *part, attempt=attempt))
        generation_tokens = await collect(generation)
        engine.cancel("r")
        return generation_tokens[0]

    assert run(history()) == tokens


async def test_a_schedulers_word_that_time_is_up_ends_the_call() -> None:
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask(time_s=30.0)])
    assert 29 < engine.submissions[0].time_left_s <= 30
    ledger.close_attempt("r", 0, 1, CloseReason.DEADLINE, "its time is up")
    with pytest.raises(DeadlinePassed, match="within its 30 s"):
        await anext(generation)
    assert ledger.num_open == 0


async def test_a_resume_and_a_claim_say_how_much_time_is_left() -> None:
    """As time left: clocks of two machines are not compared."""
    ledger, engine = stage()
    silent(engine)
    generation = await ledger.open([ask(time_s=30.0)])
    await asyncio.sleep(0)
    ledger.close_attempt("r", 0, 1, CloseReason.PREEMPTED, "moved")
    (claim,) = ledger.claims()
    first, again = engine.submissions[0], engine.submissions[-1]
    assert first.time_left_s > again.time_left_s > claim.time_left_s > 0
    assert first.waited_s < again.waited_s < claim.waited_s
    generation.close()

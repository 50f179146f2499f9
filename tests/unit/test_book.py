"""Promises of the worker's book: orders followed in order, blocks conserved, nothing run twice or lost."""

import random

import pytest

from attention_workers.book import Book, OrderRefused
from attention_workers.kv_blocks import KvBlocks, blocks_overlapped
from attention_workers.microbatch import ping_pong, split
from attention_workers.step import AttemptId, FinishReason, Plan, Sampling, Start, StepResult, TokenDelta
from model.layer_types import FULL

EOS = 7


def book(blocks=8, block_tokens=4, sequences_max=16, model_len_max=64):
    return Book("fp", 1, KvBlocks(blocks), block_tokens, sequences_max, model_len_max)


def start(name="r", prompt=5, max_tokens=4, accepted=(), number=1, priority=0, arrival=0, salt=""):
    return Start(
        AttemptId(name, 0, number), "gw", tuple(range(10, 10 + prompt)), tuple(accepted), Sampling(),
        frozenset([EOS]), max_tokens, None, priority, arrival, cache_salt=salt,
    )  # fmt: skip


def plan(number=1, starts=(), stops=(), term=1, **kw):
    kw = {"step_tokens_max": 32, "chunk_tokens_max": 16} | kw
    return Plan(term, number, "fp", 1, tuple(starts), tuple(stops), **kw)


def run_step(b, token=lambda s: 100 + s.num_generated, result=None):
    """One step as the worker runs it, with tokens drawn by a function."""
    result = result or StepResult()
    spans = b.compose(result)
    b.check()
    b.computed(spans, result)
    for s in [span.sequence for span in spans if span.samples]:
        t = token(s)
        b.sampled(s, t, TokenDelta(s.start.attempt, s.num_generated, (t,)), result)
    b.check()
    return spans, result


def test_a_sequence_runs_until_its_length_without_further_orders():
    """A plan is a standing order."""
    b = book()
    b.apply(plan(starts=[start(max_tokens=3)]), StepResult())
    tokens, ends = [], []
    while b.sequences:
        _, result = run_step(b)
        tokens += [t for d in result.deltas["gw"] for t in d.tokens]
        ends += result.completions
    assert tokens == [100, 101, 102]
    assert [(c.reason, c.num_tokens) for c in ends] == [(FinishReason.LENGTH, 3)]
    assert b.spaces[FULL].num_available == b.spaces[FULL].total


def test_a_stop_token_ends_a_sequence_and_is_delivered_with_the_reason():
    b = book()
    b.apply(plan(starts=[start(max_tokens=30)]), StepResult())
    _, result = run_step(b, token=lambda s: EOS)
    [delta] = result.deltas["gw"]
    assert (delta.tokens, delta.finish) == ((EOS,), FinishReason.STOP)
    assert not b.sequences


def test_prompts_are_cut_into_chunks_and_decodes_come_first():
    b = book(blocks=16)
    b.apply(plan(starts=[start("a", prompt=3, arrival=0)]), StepResult())
    run_step(b)
    limits = {"step_tokens_max": 8, "chunk_tokens_max": 5}
    b.apply(plan(2, [start("b", prompt=12, arrival=1)], **limits), StepResult())
    spans, _ = run_step(b)
    assert [(s.sequence.start.attempt.request_id, s.first, s.count) for s in spans] == [("a", 3, 1), ("b", 0, 5)]
    spans, _ = run_step(b)
    assert [(s.first, s.count) for s in spans] == [(4, 1), (5, 5)]


def test_the_last_in_order_gives_way_when_the_pool_is_dry_and_comes_back():
    """The pool serves on without the scheduler, and the sequence that waited loses no token."""
    b = book(blocks=4, block_tokens=4, model_len_max=16)
    b.apply(plan(starts=[start("a", 7, 8, arrival=0), start("b", 7, 8, arrival=1)]), StepResult())
    tokens, paused = {"a": [], "b": []}, []
    for _ in range(60):
        _, result = run_step(b, token=lambda s: 100 + s.num_generated)
        paused += [a.request_id for a in result.paused]
        for d in result.deltas.get("gw", []):
            tokens[d.attempt.request_id] += d.tokens
        if not b.sequences:
            break
    assert tokens == {"a": list(range(100, 108)), "b": list(range(100, 108))}
    assert paused
    assert set(paused) == {"b"}


def test_a_later_arrival_never_takes_blocks_from_an_earlier_one():
    b = book(blocks=2, block_tokens=4, model_len_max=8)
    b.apply(plan(starts=[start("a", 6, 2, arrival=0)]), StepResult())
    run_step(b)
    b.apply(plan(2, [start("late", 3, 2, arrival=1)]), StepResult())
    spans, result = run_step(b)
    assert [s.sequence.start.attempt.request_id for s in spans] == ["a"]
    assert not result.paused


def test_who_gave_up_its_blocks_is_not_overtaken_in_the_same_step():
    """What it waits for would be held by one that waits behind it, for ever."""
    b = book(blocks=5, block_tokens=2)
    b.apply(plan(starts=[start("a", 6, 9, arrival=1)]), StepResult())
    run_step(b)
    late = start("late", 7, 2, arrival=2, salt="late")
    urgent = start("urgent", 4, 1, priority=-1, arrival=3, salt="urgent")
    b.apply(plan(2, [late, urgent], chunk_tokens_max=4), StepResult())
    spans, result = run_step(b)
    assert [s.sequence.start.attempt.request_id for s in spans] == ["urgent"]
    assert [a.request_id for a in result.paused] == ["a"]
    for _ in range(60):
        run_step(b)
    assert not b.sequences


@pytest.mark.parametrize("window", [None, 3, 9])
def test_a_step_computes_something_however_small_the_pool_is(window):
    """Whoever comes, with whatever urgency, while others are paused: all come to their end."""
    for seed in range(25):
        rng = random.Random(seed)
        total, block_tokens = rng.randint(1, 12), rng.choice([1, 2, 4])
        sliding = None if window is None else KvBlocks(blocks_overlapped(window, block_tokens) + seed % 4, window)
        b = Book("fp", 1, KvBlocks(total), block_tokens, 16, 64, sliding=sliding)
        waiting = [
            start(
                str(i),
                rng.randint(1, min(64, total * block_tokens)),
                rng.randint(1, 20),
                priority=rng.randint(0, 2),
                arrival=i,
                salt=rng.choice("abcdef"),
            )
            for i in range(15)
        ]
        number = 0
        while b.sequences or waiting:
            if waiting and (rng.random() < 0.3 or not b.sequences):
                number += 1
                limits = {"step_tokens_max": rng.choice([1, 7, 32]), "chunk_tokens_max": rng.choice([1, 3, 16])}
                b.apply(plan(number, [waiting.pop() for _ in waiting[:3]], **limits), StepResult())
            spans, result = run_step(b)
            assert spans or result.paused or not b.sequences, seed


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (plan(3), "does not follow"),
        (plan(1, term=0), "newest seen is 1"),
        (Plan(1, 2, "other", 1), "checkpoint other"),
        (Plan(1, 2, "fp", 9), "incarnation 9"),
    ],
)
def test_an_order_out_of_turn_changes_nothing(wrong, why):
    """Old terms, gaps, other checkpoints and earlier lives are refused and counted."""
    b = book()
    b.apply(plan(1, [start()]), StepResult())
    before = b.state()
    with pytest.raises(OrderRefused, match=why):
        b.apply(wrong, StepResult())
    assert b.state() == before
    assert (b.term, b.plan_number, b.num_refused) == (1, 1, 1)


def test_a_gap_in_plans_is_answered_with_the_full_state():
    b = book()
    b.apply(plan(1, [start()]), StepResult())
    result = StepResult()
    with pytest.raises(OrderRefused):
        b.apply(plan(4), result)
    assert result.state == b.state()


def test_a_new_term_begins_at_one_and_keeps_what_runs():
    b = book()
    b.apply(plan(1, [start()]), StepResult())
    b.apply(plan(1, term=2, send_state=True), result := StepResult())
    assert [r.attempt.request_id for r in result.state] == ["r"]


def test_the_higher_attempt_replaces_the_lower_and_never_the_reverse():
    b = book()
    b.apply(plan(1, [start(number=2)]), StepResult())
    b.apply(plan(2, [start(number=1)]), StepResult())
    assert [a.number for a in b.sequences] == [2]
    b.apply(plan(3, [start(number=3)]), result := StepResult())
    assert [a.number for a in b.sequences] == [3]
    assert [c.reason for c in result.completions] == [FinishReason.CANCELLED]


def test_accepted_tokens_are_given_and_not_sampled_again():
    """A resume continues at the next position."""
    b = book()
    b.apply(plan(1, [start(accepted=(50, 51), max_tokens=4, number=2)]), StepResult())
    _, result = run_step(b)
    assert [(d.position, d.tokens) for d in result.deltas["gw"]] == [(2, (102,))]


def test_a_resume_that_has_already_ended_says_so_and_samples_nothing():
    b = book()
    b.apply(plan(1, [start(accepted=(50, EOS), number=2)]), result := StepResult())
    [delta] = result.deltas["gw"]
    assert (delta.position, delta.tokens, delta.finish) == (2, (), FinishReason.STOP)
    assert not b.sequences


def test_what_can_never_fit_fails_with_both_numbers():
    b = book(blocks=2, block_tokens=4)
    b.apply(plan(1, [start(prompt=9)]), result := StepResult())
    [delta] = result.deltas["gw"]
    assert delta.finish is FinishReason.FAILED
    assert "9 tokens" in delta.detail
    assert "at most 8" in delta.detail


@pytest.mark.parametrize("seed", range(60))
def test_random_orders_lose_nothing_and_conserve_blocks(seed):
    """Whatever is started, stopped and starved of blocks: each sequence ends once with the tokens it would have
    had alone."""
    rng = random.Random(seed)
    b = book(blocks=rng.randint(4, 12), block_tokens=4, model_len_max=rng.choice([16, 24]))
    room = min(b.model_len_max, b.spaces[FULL].total * 4)
    wanted, tokens, ends, number = {}, {}, {}, 0
    for turn in range(400):
        result = StepResult()
        starts, stops = [], []
        if turn < 150 and rng.random() < 0.3:
            s = start(
                f"r{turn}", rng.randint(1, room - 1), rng.randint(1, 12), priority=rng.randint(0, 1),
                arrival=turn, salt=rng.choice("abcd"),
            )  # fmt: skip
            wanted[s.attempt.request_id] = s
            starts.append(s)
        if b.sequences and rng.random() < 0.03:
            stops.append(rng.choice(sorted(b.sequences)))
        if starts or stops:
            number += 1
            limits = {"step_tokens_max": rng.randint(1, 20), "chunk_tokens_max": rng.randint(1, 9)}
            b.apply(plan(number, starts, stops, **limits), result)
        run_step(b, result=result)
        for d in result.deltas.get("gw", []):
            got = tokens.setdefault(d.attempt.request_id, [])
            assert d.position == len(got)
            got += d.tokens
        for c in result.completions:
            assert c.attempt.request_id not in ends
            ends[c.attempt.request_id] = c.reason
        if turn >= 150 and not b.sequences:
            break
    assert ends.keys() == wanted.keys()
    for name, s in wanted.items():
        count = min(s.max_tokens, room - len(s.prompt))
        if ends[name] is FinishReason.LENGTH:
            assert tokens[name] == [100 + i for i in range(count)]
    assert b.spaces[FULL].num_available == b.spaces[FULL].total


def test_freeing_a_block_twice_stops_the_worker():
    blocks = KvBlocks(2)
    block = blocks.take()
    blocks.give_back([block])
    with pytest.raises(KeyError):
        blocks.give_back([block])


# --- microbatches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("microbatches", range(1, 5))
def test_ping_pong_dispatches_and_combines_each_once_in_order(layers, microbatches):
    """Never combined before dispatched; at most one ticket in flight per microbatch; layers in order."""
    in_flight, done = set(), []
    for work in ping_pong(layers, microbatches):
        key = (work.layer, work.microbatch)
        if work.op == "dispatch":
            assert work.microbatch not in {mb for _, mb in in_flight}
            in_flight.add(key)
        else:
            in_flight.remove(key)
            done.append(key)
    assert not in_flight
    assert sorted(done) == [(layer, mb) for layer in range(layers) for mb in range(microbatches)]
    for mb in range(microbatches):
        assert [layer for layer, other in done if other == mb] == list(range(layers))


def test_slices_hold_whole_sequences_and_none_is_empty():
    b = book(blocks=16)
    b.apply(plan(starts=[start(f"s{i}", prompt=i + 1, arrival=i) for i in range(5)]), StepResult())
    spans = b.compose(StepResult())
    parts = split(spans, 3)
    assert sorted(map(id, (s for p in parts for s in p))) == sorted(map(id, spans))
    assert all(parts)
    assert len(split(spans[:1], 3)) == 1


def test_what_does_not_fit_beside_what_runs_is_given_back_and_not_failed():
    """Its scheduler was told what ran before a plan of an earlier stream was applied: no fault of the request."""
    b = book(sequences_max=2)
    b.apply(plan(starts=[start("a"), start("b")]), StepResult())
    result = StepResult()
    b.apply(plan(2, starts=[start("c")]), result)
    assert [(c.attempt.request_id, c.reason) for c in result.completions] == [("c", FinishReason.CANCELLED)]
    assert not result.deltas
    assert len(b.sequences) == 2


def test_what_is_told_of_all_that_runs_is_of_the_end_of_what_is_told():
    """A plan did not follow, so all was told; the next one ended some of it."""
    b, result = book(), StepResult()
    b.apply(plan(starts=[start("a"), start("b")]), result)
    with pytest.raises(OrderRefused):
        b.apply(plan(5), result)
    b.apply(plan(2, stops=[AttemptId("a", 0, 1)]), result)
    b.restate(result)
    assert [running.attempt.request_id for running in result.state] == ["b"]
    assert [c.attempt.request_id for c in result.completions] == ["a"]

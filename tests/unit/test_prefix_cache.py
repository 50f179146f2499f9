"""Promises of the prefix cache: what is skipped is there, bit for bit its own, and no block is lost over it."""

import hashlib
from dataclasses import replace

import pytest

from attention_workers import prefix_names
from attention_workers.book import Book
from attention_workers.kv_blocks import KvBlocks
from attention_workers.prefix_cache import HINTS_MAX
from attention_workers.step import AttemptId, StepResult
from model.layer_types import FULL, SLIDING
from tests.unit.test_book import plan, run_step, start

T = 4


def book(full=64, sliding=None, window=None, model_len_max=400, cache=True):
    space = None if window is None else KvBlocks(sliding, window)
    return Book("fp", 1, KvBlocks(full), T, 16, model_len_max, sliding=space, prefix_cache=cache)


def prompt_of(tokens, name="r", max_tokens=4, salt="", **kw):
    return replace(start(name, 1, max_tokens, salt=salt, **kw), prompt=tuple(tokens))


def run(b, *starts, number=None, **limits):
    """All of these together to their end; cached tokens by request, as their first deltas tell."""
    result = StepResult()
    b.apply(plan((number or b.plan_number) + 1, starts, **limits), result)
    cached = {}
    while b.sequences:
        run_step(b, result=result)
        for delta in result.deltas.get("gw", []):
            if delta.position == 0:
                cached[delta.attempt.request_id] = delta.num_cached
            else:
                assert delta.num_cached == 0
        result = StepResult()
    return cached


# --- hits ------------------------------------------------------------------------------------------


def test_a_prompt_that_came_before_is_computed_from_its_last_whole_block_on():
    b = book()
    assert run(b, prompt_of(range(10, 31))) == {"r": 0}
    assert run(b, prompt_of(range(10, 31))) == {"r": 20}
    assert run(b, prompt_of([*range(10, 22), 99, 98, 97])) == {"r": 12}
    assert run(b, prompt_of([99, *range(11, 31)])) == {"r": 0}


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_of_a_prompt_is_always_computed(length, cached):
    """Its logits are wanted, and they are not kept."""
    b = book()
    run(b, prompt_of(range(10, 50)))
    assert run(b, prompt_of(range(10, 10 + length))) == {"r": cached}


def test_an_answer_is_cached_as_well_as_its_prompt():
    """The next turn of a conversation brings both back."""
    b = book()
    answer = [100 + i for i in range(9)]
    run(b, prompt_of(range(10, 23), max_tokens=9))
    assert run(b, prompt_of([*range(10, 23), *answer, 7, 8, 9])) == {"r": 20}


def test_siblings_compute_their_prompt_once():
    """n of them in one plan: the first computes, the others go on behind it; a block is held by all of them."""
    b = book()
    b.apply(
        plan(1, [replace(prompt_of(range(10, 50)), attempt=AttemptId("r", i, 1)) for i in range(4)]), StepResult()
    )
    rows = 0
    while not all(s.is_prompt_done for s in b.sequences.values()):
        rows += sum(span.count for span in run_step(b)[0] if span.first < 40)
    assert rows == 40 + 3 * 4
    assert b.spaces[FULL].total - b.spaces[FULL].num_available <= 10 + 4


def test_a_prompt_goes_on_behind_another_that_computes_it_now():
    """It does not compute the same blocks beside it, nor wait for what the other does not have."""
    b = book(full=128)
    b.apply(plan(1, [prompt_of(range(10, 74), "a")], chunk_tokens_max=8), StepResult())
    run_step(b)
    late = prompt_of([*range(10, 58), *range(200, 232)], "late", arrival=1)
    b.apply(plan(2, [late], chunk_tokens_max=8), StepResult())
    spans = []
    while b.sequences:
        spans += [span for span in run_step(b)[0] if span.sequence.start is late]
    assert min(span.first for span in spans) == 48
    assert sum(span.count for span in spans if span.first < 80) == 32


def test_salts_keep_prompts_apart():
    b = book()
    run(b, prompt_of(range(10, 31), salt="mine"))
    assert run(b, prompt_of(range(10, 31), salt="yours")) == {"r": 0}
    assert run(b, prompt_of(range(10, 31))) == {"r": 0}
    assert run(b, prompt_of(range(10, 31), salt="mine")) == {"r": 20}


def test_names_tell_apart_whatever_differs():
    """Checkpoint, salt, and any token before a block's end; they are the hash they say."""

    def names(fingerprint="fp", salt="", tokens=range(8)):
        found = []
        prefix_names.follow(found, list(tokens), T, prefix_names.root(fingerprint, salt))
        return found

    assert len(names()) == 2
    others = [names("other"), names(salt="s"), names(tokens=[1, *range(1, 8)]), names("fp\0s"), names("f", "p")]
    assert len({tuple(n) for n in [names(), *others]}) == 5 + 1
    assert all(len({names()[i], *(n[i] for n in others)}) == 6 for i in range(2))
    root = hashlib.blake2b(b"fp\0", digest_size=32).digest()
    packed = b"".join(i.to_bytes(4, "little") for i in range(4))
    assert names()[0] == hashlib.blake2b(root + packed, digest_size=32).digest()
    grown = names(tokens=range(5))
    prefix_names.follow(grown, list(range(8)), T, b"the root is not asked again")
    assert grown == names()


def test_switched_off_nothing_is_cached():
    b = book(cache=False)
    for _ in range(2):
        assert run(b, prompt_of(range(10, 31))) == {"r": 0}
    assert (b.spaces[FULL].num_free, b.prefixes.num_hits) == (64, 0)


def test_a_paused_sequence_comes_back_to_what_is_left_of_it():
    """And what it had computed itself does not count as cached."""
    b = book(full=8)
    b.apply(plan(1, [prompt_of(range(10, 38), "low", priority=1)]), StepResult())
    run_step(b)
    run_step(b)
    b.apply(plan(2, [prompt_of(range(100, 116), "urgent", max_tokens=2)]), StepResult())
    _, result = run_step(b)
    assert [a.request_id for a in result.paused] == ["low"]
    again = []
    while b.sequences:
        spans, result = run_step(b)
        again += [span for span in spans if span.sequence.start.attempt.request_id == "low"]
        assert all(delta.num_cached == 0 for delta in result.deltas.get("gw", []))
    assert again[0].first == 12


def test_a_resume_finds_what_its_prompt_left_and_accepted_tokens_too():
    b = book()
    run(b, prompt_of(range(10, 23), "other", max_tokens=9))
    resumed = replace(prompt_of(range(10, 23), max_tokens=12, number=2), accepted=(100, 101, 102, 103, 104, 105))
    b.apply(plan(2, [resumed]), StepResult())
    spans, _ = run_step(b)
    assert [(span.first, span.count) for span in spans] == [(16, 3)]


def test_what_cannot_be_trusted_is_not_found_again():
    """A sequence whose logits are not finite may have left anything in its blocks."""
    b = book()
    b.apply(plan(1, [prompt_of(range(10, 31))]), StepResult())
    run_step(b)
    [sequence] = b.sequences.values()
    b.fail(sequence, "not finite", StepResult())
    b.check()
    assert run(b, prompt_of(range(10, 31))) == {"r": 0}


def test_what_cannot_be_trusted_is_not_found_again_where_the_window_has_left_it():
    """Else a fault that passes would stay: the next prompt's good blocks give way to the bad ones of the name."""
    b = book(sliding=30, window=9)
    b.apply(plan(1, [prompt_of(range(10, 51))], chunk_tokens_max=8), StepResult())
    for _ in range(4):
        run_step(b)
    [sequence] = b.sequences.values()
    assert sequence.tables[SLIDING].first > 0
    b.fail(sequence, "not finite", StepResult())
    b.check()
    assert not any(name in space for space in b.spaces.values() for name in names_of(range(10, 51)))
    assert run(b, prompt_of(range(10, 51))) == {"r": 0}


def test_without_a_cache_equal_prompts_do_not_wait_for_one_another():
    """There is nothing to be found in the next step."""
    b = book(cache=False)
    b.apply(plan(1, [prompt_of(range(10, 19), f"r{i}") for i in range(4)]), StepResult())
    spans, _ = run_step(b)
    assert len(spans) == 4


# --- windows ---------------------------------------------------------------------------------------


def test_a_hit_needs_all_that_the_window_sees():
    """A token at P sees from P - W + 1 on: with one of those blocks gone, a smaller P that has them counts."""
    b = book(sliding=30, window=9)  # of 4: at P = 4k it sees blocks k - 2 and k - 1
    run(b, prompt_of(range(10, 51), max_tokens=1))
    names = names_of(range(10, 51))
    assert run(b, prompt_of(range(10, 51), max_tokens=1)) == {"r": 40}
    lose(b, SLIDING, names[9])
    assert run(b, prompt_of(range(10, 51), max_tokens=1)) == {"r": 36}
    lose(b, SLIDING, names[7])
    lose(b, SLIDING, names[2])
    assert run(b, prompt_of(range(10, 42), max_tokens=1)) == {"r": 28}
    lose(b, FULL, names[5])
    lose(b, SLIDING, names[4])
    assert run(b, prompt_of(range(10, 42), max_tokens=1), chunk_tokens_max=32) == {"r": 8}
    for number in range(10):
        lose(b, SLIDING, names[number])
    assert run(b, prompt_of(range(10, 51), max_tokens=1)) == {"r": 0}


def test_a_hit_asks_for_no_block_that_the_window_does_not_see():
    b = book(sliding=30, window=9)
    run(b, prompt_of(range(10, 51), max_tokens=1))
    for name in names_of(range(10, 51))[:8]:
        lose(b, SLIDING, name)
    assert run(b, prompt_of(range(10, 51), max_tokens=1)) == {"r": 40}


def names_of(tokens, salt=""):
    names = []
    prefix_names.follow(names, list(tokens), T, prefix_names.root("fp", salt))
    return names


def lose(b, kind, name):
    """As an eviction would."""
    space = b.spaces[kind]
    if name in space:
        space.disown([name])


# --- eviction --------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first_and_of_a_sequence_its_end():
    b = book(full=13)
    run(b, prompt_of(range(10, 27), "a", max_tokens=1))  # 4 whole blocks, and so on
    run(b, prompt_of(range(110, 127), "b", max_tokens=1))
    run(b, prompt_of(range(10, 27), "a", max_tokens=1))
    run(b, prompt_of(range(210, 235), "c", max_tokens=1))  # 6 blocks and a part: 5 free, 2 given up
    assert run(b, prompt_of(range(110, 127), "b", max_tokens=1)) == {"b": 8}
    assert b.spaces[FULL].num_evicted >= 2


def test_what_is_held_is_never_given_up():
    b = book(full=6)
    b.apply(plan(1, [prompt_of(range(10, 27), "a", max_tokens=60)]), StepResult())
    run_step(b)
    run_step(b)
    held = next(iter(b.sequences.values())).tables[FULL].blocks
    before = list(held)
    b.apply(plan(2, [prompt_of(range(110, 122), "b", arrival=1)]), StepResult())
    for _ in range(3):
        run_step(b)
        assert next(iter(b.sequences.values())).tables[FULL].blocks[: len(before)] == before


# --- hints -----------------------------------------------------------------------------------------


def test_hints_tell_what_came_and_went_and_a_new_scheduler_all():
    """At the end of a prompt and of a sequence; replayed they are what is there."""
    b = book(full=9)
    known = set()
    for turn in range(12):
        result = StepResult()
        b.apply(plan(turn + 1, [prompt_of(range(turn % 5, 17 + turn % 5), f"r{turn}", max_tokens=6)]), result)
        while b.sequences:
            run_step(b, result=result)
            known |= set(result.kept)
            known -= set(result.evicted)
            assert not (result.kept or result.evicted) or result.is_news()
            result = StepResult()
        assert known == {prefix_names.hint(name) for name in b.spaces[FULL].names}
    b.apply(plan(1, term=2, send_state=True), result := StepResult())
    assert set(result.kept) == known
    assert not result.evicted


def test_decoding_alone_sends_no_hints():
    """A round in which no prompt ends and nothing finishes says nothing of blocks."""
    b = book()
    b.apply(plan(1, [prompt_of(range(10, 26), max_tokens=60)]), StepResult())
    assert len(run_step(b)[1].kept) == 4
    for _ in range(40):
        _, result = run_step(b)
        assert not [*result.kept, *result.evicted]


def test_hints_that_nobody_hears_are_bounded():
    b = book()
    for number in range(HINTS_MAX + 100):
        b.prefixes._gone(number.to_bytes(32, "little"))
    assert len(b.prefixes.changes()[1]) == HINTS_MAX


# --- what is kept longest of a window's blocks -----------------------------------------------------


def test_blocks_that_a_window_passed_by_are_given_up_before_the_ends_of_prompts():
    """So a few conversations with long prompts do not push each other's next turns out of a small space."""
    b = book(full=400, sliding=30, window=9)
    for talk in range(3):
        run(b, prompt_of(range(1000 * talk, 1000 * talk + 150), f"t{talk}", max_tokens=1))
    for talk in range(3):
        turn = [*range(1000 * talk, 1000 * talk + 150), 7, 8, 9, 10, 11]
        assert run(b, prompt_of(turn, f"t{talk}", max_tokens=1)) == {f"t{talk}": 148}


def test_where_prompts_part_is_learnt_and_kept():
    """The second that begins alike finds no window there any more, computes it, and leaves it for the third."""
    b = book(full=1000, sliding=24, window=9)
    stem = list(range(10, 90))
    found = []
    for number in range(4):
        run(b, prompt_of(range(5000 + 200 * number, 5100 + 200 * number), f"x{number}", max_tokens=1))
        prompt = [*stem, *range(1000 * number + 1000, 1000 * number + 1060)]
        found += run(b, prompt_of(prompt, f"r{number}", max_tokens=1)).values()
    assert found == [0, 0, 80, 80]

"""Promises of the two block spaces: windows hold what they see and no more, every block is accounted for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_workers.book import Book
from attention_workers.kv_blocks import BlockTable, KvBlocks, blocks_overlapped
from attention_workers.kv_sizes import size_spaces
from attention_workers.step import FinishReason, StepResult
from attention_workers.wire import hello_pb, report_pb
from cluster.scheduler.wire import decode_worker
from model.config import ModelConfig
from model.errors import NotEnoughMemory
from model.layer_types import FULL, SLIDING
from model.synthetic import Variant, config_json
from router.placement import Member
from tests.unit.test_book import plan, run_step, start


def hybrid(full=64, sliding=8, window=6, block_tokens=4, model_len_max=200):
    return Book("fp", 1, KvBlocks(full), block_tokens, 16, model_len_max, sliding=KvBlocks(sliding, window))


def test_a_window_holds_only_the_blocks_it_still_sees():
    """Whatever the length; the full layers' table holds all."""
    b = hybrid()
    b.apply(plan(starts=[start(prompt=37, max_tokens=60)], chunk_tokens_max=8), StepResult())
    [sequence] = b.sequences.values()
    while b.sequences:
        run_step(b)
        if not b.sequences:
            break
        seen_from = max(0, sequence.computed - 6 + 1)
        assert sequence.tables[SLIDING].first == seen_from // 4
        assert len(sequence.tables[SLIDING].blocks) == -(-sequence.computed // 4) - seen_from // 4 <= 3
        assert len(sequence.tables[FULL].blocks) == -(-sequence.computed // 4)


def test_a_block_that_left_a_window_is_used_again():
    """By the same sequence further on, and by another."""
    b = hybrid(sliding=5)
    b.apply(plan(starts=[start("a", prompt=20, max_tokens=40)], chunk_tokens_max=8), StepResult())
    [a] = b.sequences.values()
    numbers: dict[int, set[int]] = {}  # block id -> the block numbers it was at
    for turn in range(10):
        run_step(b)
        table = a.tables[SLIDING]
        for i, block in enumerate(table.blocks):
            numbers.setdefault(block, set()).add(table.first + i)
        if turn == 4:
            before = set(numbers)
            b.apply(plan(2, [start("b", prompt=4, max_tokens=9, arrival=1)]), StepResult())
    assert any(len(at) > 1 for at in numbers.values())
    other = next(s for s in b.sequences.values() if s is not a)
    assert set(other.tables[SLIDING].blocks) & before
    assert len(numbers) <= 5


def test_memory_of_a_hybrid_at_4096_tokens_is_the_arithmetic():
    """MiniMax-M2's widths in bfloat16, 62 layers of which every other slides over 512 tokens."""
    config = ModelConfig.from_dict(config_json("m2-layers", Variant(layers=62, hybrid=True)))
    assert (config.sliding_window, len(config.layers_of(SLIDING)), len(config.layers_of(FULL))) == (512, 31, 31)
    tile, per_block = 32, 31 * 2 * 8 * 128 * 2 * 32  # layers · keys and values · heads · width · bytes · tokens
    b = hybrid(full=200, sliding=40, window=512, block_tokens=tile, model_len_max=8192)
    b.apply(
        plan(starts=[start(prompt=4096, max_tokens=9)], step_tokens_max=512, chunk_tokens_max=256), StepResult()
    )
    peak = 0
    while not b.sequences[start().attempt].is_prompt_done:
        b.compose(result := StepResult())
        peak = max(peak, b.spaces[SLIDING].total - b.spaces[SLIDING].num_available)
        run_step(b, result=result)
    held = {kind: space.total - space.num_available for kind, space in b.spaces.items()}
    assert held == {FULL: 4096 // tile, SLIDING: 512 // tile}
    assert peak <= blocks_overlapped(511 + 256, tile) == 25
    assert sum(held.values()) * per_block == 31 * 4096 * (4096 + 512)  # 4,096 bytes a token and layer, as reckoned
    whole = 2 * held[FULL] * per_block
    assert sum(held.values()) * per_block / whole == pytest.approx(0.5625)


def test_a_chunk_is_cut_to_what_the_sliding_space_holds():
    """A plan may allow more than a small space has room for: the prompt goes on all the same."""
    b = hybrid(sliding=3, window=6)
    assert b.chunk_fits == 4  # 2 blocks of 4, and a token that begins a third, less the 5 before
    b.apply(plan(starts=[start(prompt=30, max_tokens=3)]), StepResult())
    counts = []
    while b.sequences:
        spans, _ = run_step(b)
        counts += [span.count for span in spans]
    assert max(counts) == 4
    assert sum(counts) == 32


@given(first=st.integers(0, 40), num=st.integers(1, 60), block_tokens=st.integers(1, 9))
def test_no_run_of_tokens_overlaps_more_blocks(first, num, block_tokens):
    overlapped = (first + num - 1) // block_tokens - first // block_tokens + 1
    assert overlapped <= blocks_overlapped(num, block_tokens)


def test_a_table_leaves_blocks_at_its_front_only():
    table = BlockTable(2, [7, 3, 9])
    assert (table.leave(4), table.first, table.blocks, table.end) == ([7, 3], 4, [9], 5)
    with pytest.raises(AssertionError):
        table.leave(6)
    assert (table.clear(), table.first, table.blocks) == ([9], 0, [])


EVENTS = st.lists(
    st.one_of(
        st.just(("step",)),
        st.tuples(
            st.just("start"), st.integers(1, 60), st.integers(1, 30), st.integers(0, 1), st.sampled_from("abc")
        ),
        st.tuples(st.just("stop"), st.integers(0, 9)),
        st.tuples(st.just("limits"), st.integers(1, 40), st.integers(1, 30)),
        st.tuples(st.just("drop"),),
    ),
    min_size=15,
    max_size=60,
)  # fmt: skip


@given(EVENTS, st.integers(4, 20), st.integers(1, 12), st.integers(0, 6))
def test_blocks_are_conserved_in_both_spaces_after_every_event(events, full, window, spare):
    """Whatever is started, stopped and starved: free + held + cached = total in each space, all ends."""
    b = hybrid(full, blocks_overlapped(window, 4) + spare, window, model_len_max=64)
    number, arrivals, ends, limits = 0, 0, {}, {"step_tokens_max": 16, "chunk_tokens_max": 8}

    def step(result):
        run_step(b, result=result)  # checks after choosing and after sampling
        for end in result.completions:
            assert end.attempt not in ends
            ends[end.attempt] = end.reason

    for kind, *args in [*events, *[("step",)] * 3]:
        result, starts, stops = StepResult(), [], []
        if kind == "start":
            prompt, max_tokens, priority, salt = args
            name = f"r{arrivals}"
            starts.append(start(name, prompt, max_tokens, priority=priority, arrival=arrivals, salt=salt))
            arrivals += 1
        elif kind == "stop":
            stops = sorted(b.sequences)[args[0] : args[0] + 1]
        elif kind == "limits":
            limits = {"step_tokens_max": args[0], "chunk_tokens_max": args[1]}
        elif kind == "drop":
            b.drop("gw", result)
        if kind in ("start", "stop", "limits"):
            number += 1
            b.apply(plan(number, starts, stops, **limits), result)
        b.check()
        step(result)
    for _ in range(4000):
        if not b.sequences:
            break
        step(StepResult())
    assert not b.sequences
    assert len(ends) == arrivals
    assert all(space.num_available == space.total for space in b.spaces.values())
    assert set(ends.values()) <= {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.FAILED}


# --- sizes -----------------------------------------------------------------------------------------

SIZES = {"window": 128, "block_tokens": 32, "sequences_max": 256, "sequence_tokens": 1024, "model_len_max": 32768,
         "prefix_cache": True}  # fmt: skip


def sizes(kv_bytes, full=1000, sliding=1000, **changed):
    return size_spaces(kv_bytes, {FULL: full, SLIDING: sliding}, **(SIZES | changed))


def test_a_model_of_full_layers_spends_all_on_one_space():
    assert sizes(50_500, sliding=0, window=None) == {FULL: 50}
    assert sizes(10**12, sliding=0, window=None) == {FULL: 256 * 1024}


def test_both_spaces_run_dry_together_under_sequences_of_the_length_named():
    """32 full blocks against 5 that a window of 128 lies in, and room for a chunk."""
    blocks = sizes(5_000_000)
    assert blocks[FULL] / 32 == pytest.approx((blocks[SLIDING] - 8) / 5, rel=0.01)
    assert 4_999_000 <= sum(blocks.values()) * 1000 <= 5_000_000


def test_without_a_prefix_cache_the_sliding_space_has_what_running_sequences_need():
    """With one, windows of those that have ended are worth keeping: it grows with the memory."""
    assert sizes(10**9, prefix_cache=False)[SLIDING] == 256 * 5 + 8
    assert sizes(10**9)[SLIDING] > 100_000


@given(
    spare=st.integers(-10**4, 10**4) | st.integers(0, 10**8), full=st.sampled_from([0, 700, 9000]),
    sliding=st.sampled_from([300, 1000]),
    window=st.integers(1, 4000), sequences_max=st.integers(1, 300), sequence_tokens=st.integers(1, 5000),
)  # fmt: skip
def test_spaces_fit_their_memory_and_hold_at_least_one_sequence(
    spare, full, sliding, window, sequences_max, sequence_tokens
):
    """`spare`: beyond what one sequence takes at least."""
    changed = {"window": window, "sequences_max": sequences_max, "sequence_tokens": sequence_tokens}
    least = blocks_overlapped(window, 32)
    kv_bytes = max(1, full + least * sliding + spare)
    if kv_bytes < full + least * sliding:
        with pytest.raises(
            NotEnoughMemory, match=rf"kv_bytes .*: {kv_bytes}; accepted: at least {full + least * sliding}"
        ):
            sizes(kv_bytes, full, sliding, **changed)
        return
    blocks = sizes(kv_bytes, full, sliding, **changed)
    assert blocks[FULL] * full + blocks[SLIDING] * sliding <= kv_bytes
    assert blocks[FULL] >= 1
    assert blocks[SLIDING] >= least
    assert KvBlocks(blocks[SLIDING], window).chunk_max(32) >= 1


# --- what the scheduler is told --------------------------------------------------------------------


def test_the_scheduler_learns_of_both_spaces():
    b = hybrid(full=64, sliding=8, window=6)
    b.apply(plan(starts=[start(prompt=20, max_tokens=9)]), StepResult())
    run_step(b)
    message = report_pb(Member("a", 1), b, 1, 1, experts_missing=False)
    message.hello.CopyFrom(hello_pb(b))
    joined = decode_worker(message, "a#1")
    assert (joined.limits.blocks_total, joined.limits.sliding_blocks_total) == (64, 8)
    assert (joined.limits.block_tokens, joined.limits.sliding_window) == (4, 6)
    assert (joined.report.blocks_free, joined.report.sliding_blocks_free) == (60, 6)
    for chunk in (1, 7, 16):
        space = b.spaces[SLIDING]
        assert joined.limits.blocks_for(100, chunk).sliding == space.most_held(100, chunk, 4)
    assert replace(joined.limits, sliding_window=0).blocks_for(100, 8).sliding == 0

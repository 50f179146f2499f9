"""Promises of a step's composition: steady gaps between tokens, and no prompt that waits for ever."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest

from attention_workers.batching import GROWTH, GROWTH_MAX, ROWS_MIN, Pace, in_turn, share
from attention_workers.step import StepResult
from tests.unit.test_book import book, plan, run_step, start


@dataclass
class Prompt:
    order: int
    pending: int
    is_paused: bool = False

    @property
    def arrival(self) -> int:
        return self.order


def measured(promised_s: float, decode_s: float, row_s: float) -> Pace:
    pace = Pace()
    pace.promise(promised_s)
    for _ in range(50):
        pace.observe(16, 0, decode_s)
        pace.observe(16, 100, decode_s + 100 * row_s)
    return pace


@pytest.mark.parametrize(("decode_s", "row_s"), [(0.010, 0.0002), (0.002, 0.00001), (0.2, 0.001)])
@pytest.mark.parametrize("promised_s", [0.0, 0.25])
def test_a_step_with_prompt_rows_stays_within_the_promise(
    promised_s: float, decode_s: float, row_s: float
) -> None:
    rows = measured(promised_s, decode_s, row_s).prompt_rows(16, 100_000)
    allowed_s = promised_s or (1 + GROWTH) * decode_s
    assert decode_s + rows * row_s <= allowed_s * 1.001
    assert decode_s + (rows + ROWS_MIN + 1) * row_s > allowed_s  # and no further from it than must be


def run(pace: Pace, decode_s: float, row_s: float, num_prompts: int = 1) -> list[tuple[int, float]]:
    """Prompt rows and time of each step of a machine that never wavers, with 16 that decode."""
    steps = []
    for _ in range(400):
        rows = pace.prompt_rows(16, 100_000, num_prompts)
        steps.append((rows, decode_s + rows * row_s))
        pace.observe(16, *steps[-1])
    return steps


@pytest.mark.parametrize("tile", [0.1, 0.4, 0.6, 0.95, 1.2, 1.45, 2.0, 7.0])
def test_a_prompt_at_most_doubles_the_median_time_between_tokens(tile: float) -> None:
    """Whatever the rows that are worth a step cost, in steps without; and the prompt has all that it is due."""
    steps = run(measured(0.0, 0.010, 0.010 * tile / ROWS_MIN), 0.010, 0.010 * tile / ROWS_MIN)
    took = [time_s for _, time_s in steps]
    assert statistics.median(took) <= 2 * 0.010 * 1.001
    assert statistics.fmean(took) <= (1 + GROWTH) * 0.010 * 1.02
    assert statistics.fmean(took) >= (1 + 0.6 * GROWTH) * 0.010


def test_prompts_that_many_wait_for_have_more_of_the_time() -> None:
    """As much as those are of all; their share is bounded."""
    mean = [
        statistics.fmean(time_s for _, time_s in run(measured(0.0, 0.01, 1e-5), 0.01, 1e-5, num_prompts)) / 0.01
        for num_prompts in (1, 8, 16, 32, 1000)
    ]
    assert mean[0] == mean[1]
    assert mean == sorted(mean)
    assert mean[2] == pytest.approx(2, abs=0.2)
    assert mean[-1] <= 1 + GROWTH_MAX


def test_an_answer_that_has_begun_comes_back_sooner_than_a_new_one_begins() -> None:
    """As after a loss: beside as many decodes its prompt has thrice the time."""
    rows = []
    for accepted in ((), tuple(range(100, 190))):
        b = book(blocks=400, block_tokens=4, model_len_max=1024)
        decoding = [start(f"d{n}", prompt=2, max_tokens=50, arrival=n) for n in range(4)]
        b.apply(plan(1, decoding, step_tokens_max=200, chunk_tokens_max=200), StepResult())
        run_step(b)
        b.pace = measured(0.0, 0.010, 0.0002)
        long = start("long", prompt=190 - len(accepted), max_tokens=200, accepted=accepted, arrival=9)
        b.apply(plan(2, [long], step_tokens_max=200, chunk_tokens_max=200), StepResult())
        spans = b.compose(StepResult())
        rows.append(sum(span.count for span in spans if not span.is_decode))
    new, begun = rows
    assert ROWS_MIN <= new < begun


def test_a_prompt_goes_on_whatever_was_promised() -> None:
    """In rows worth a step, in some of the steps."""
    rows = [rows for rows, _ in run(measured(0.001, 0.010, 0.001), 0.010, 0.001)]
    assert set(rows) == {0, ROWS_MIN}
    assert rows.count(ROWS_MIN) >= 400 // 18
    assert Pace().prompt_rows(16, 512) == ROWS_MIN  # nothing measured yet


def test_prompts_have_the_whole_step_while_nobody_decodes() -> None:
    assert measured(0.001, 0.010, 0.001).prompt_rows(0, 512) == 512


def test_the_measure_follows_a_machine_that_slows_down() -> None:
    pace = measured(0.0, 0.010, 0.00001)
    before = pace.prompt_rows(16, 10_000)
    for _ in range(30):
        pace.observe(16, 50, 0.010 + 50 * 0.00010)
    assert 0 < pace.prompt_rows(16, 10_000) < before / 8


def test_the_first_and_the_shortest_go_together_and_strictly_in_order_while_one_is_paused() -> None:
    prompts = [Prompt(n, pending) for n, pending in enumerate([3000, 2000, 9, 1000, 5, 7])]
    assert [p.order for p in in_turn(prompts)] == [0, 2, 4, 5]
    prompts[3].is_paused = True
    assert in_turn(prompts) == prompts


def test_what_one_does_not_need_is_there_for_the_next() -> None:
    left, given = 10, []
    for number, pending in enumerate([1, 9, 9]):
        given.append(min(pending, share(left, 3 - number)))
        left -= given[-1]
    assert given == [1, 5, 4]


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_ever() -> None:
    """Short ones that keep coming cost the long one at most its share of each step."""
    b = book(blocks=400, block_tokens=4, model_len_max=1024)
    limits = {"step_tokens_max": 16, "chunk_tokens_max": 16}
    b.apply(plan(1, [start("long", prompt=160, max_tokens=1, arrival=0)], **limits), StepResult())
    waits: dict[str, int] = {}
    steps = 0
    while any(a.request_id == "long" for a in b.sequences):
        name = f"s{steps}"
        b.apply(plan(steps + 2, [start(name, prompt=4, max_tokens=1, arrival=steps + 1)], **limits), StepResult())
        waits[name] = steps
        _, result = run_step(b)
        for completion in result.completions:
            waits[completion.attempt.request_id] = steps - waits.get(completion.attempt.request_id, 0)
        steps += 1
        assert steps <= 160 // 4 + 2  # a quarter of the rows are its own
    assert max(waits[f"s{n}"] for n in range(steps - 1)) <= 1


def test_a_prompt_of_low_priority_is_computed_though_higher_ones_keep_coming() -> None:
    """Each of them takes a whole step's rows, and more of them wait than a step computes."""
    b = book(blocks=400, block_tokens=4, model_len_max=1024, sequences_max=64)
    limits = {"step_tokens_max": 16, "chunk_tokens_max": 16}
    low = start("low", prompt=160, max_tokens=1, priority=1)
    first = [start(f"f{n}", prompt=16, max_tokens=1, arrival=1, salt=f"f{n}") for n in range(8)]
    b.apply(plan(1, [low, *first], **limits), StepResult())
    for step in range(160 // 3 + 2):
        high = start(f"h{step}", prompt=16, max_tokens=1, arrival=step + 2, salt=f"h{step}")
        b.apply(plan(step + 2, [high], **limits), StepResult())
        run_step(b)
    assert low.attempt not in b.sequences
    assert len(b.sequences) > 4  # the others wait for their turn

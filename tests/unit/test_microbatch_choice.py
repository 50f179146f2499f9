"""Promises of `microbatches: auto`: it finds what is best, cheaply, keeps it, and finds 1 where 1 is best."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_workers.config import AttentionConfig
from attention_workers.microbatch import ping_pong
from attention_workers.microbatch_choice import (
    GAIN_MIN,
    LOSS_MAX,
    MICROBATCHES_MAX,
    MicrobatchChoice,
    Phases,
    kind_of,
)
from attention_workers.overlap import Affine, Costs, Fit, hides_from, step_cost
from router.transport.faults import Faults, Leg, Wire

LAYERS = 12
US = 1e3


class World:
    """A cluster of which only costs are known, in nanoseconds; `hidden` 0..1: how much of overlap comes true."""

    def __init__(self, costs: Costs, hidden: float = 1.0, noise: float = 0.0, seed: int = 0) -> None:
        self.costs, self.hidden, self.noise, self.chance = costs, hidden, noise, random.Random(seed)

    def step_ns(self, rows: int, m: int) -> float:
        overlapped = step_cost(self.costs, rows, m, LAYERS)
        in_turn = m * step_cost(self.costs, rows / m, 1, LAYERS)
        return self.hidden * overlapped + (1 - self.hidden) * in_turn

    def run(self, choice: MicrobatchChoice, sizes: list[int], has_prompts: bool = False) -> list[int]:
        """What was chosen for each step."""
        chosen = []
        for rows in sizes:
            kind = kind_of(rows, has_prompts)
            m = choice.choose(kind, rows)
            each = rows / m
            parts = [cost.at(each) * (1 + self.noise * self.chance.uniform(-1, 1)) for cost in self.costs]
            step_ns = self.step_ns(rows, m) * (1 + self.noise * self.chance.uniform(-1, 1))
            choice.measured(kind, m, rows, Phases(step_ns, *parts))
            chosen.append(m)
        return chosen

    def best_ns(self, rows: int) -> float:
        return min(self.step_ns(rows, m) for m in range(1, min(rows, MICROBATCHES_MAX) + 1))


def costs(attention: tuple[float, float], experts: tuple[float, float], exchange: tuple[float, float]) -> Costs:
    """Each as microseconds per row and fixed."""
    return Costs(*(Affine(slope * US, fixed * US) for slope, fixed in (attention, experts, exchange)))


SLOW_LINK = costs((10, 20), (10, 20), (1, 800))
FAST_LINK = costs((10, 20), (5, 400), (0.1, 50))  # experts are bound by memory: a slice costs what the whole does


def test_slow_links_make_more_microbatches_pay() -> None:
    choice = MicrobatchChoice("auto", LAYERS)
    world = World(SLOW_LINK)
    world.run(choice, [32] * 2000)
    assert choice.current(kind_of(32, False)) > 1
    assert world.step_ns(32, choice.current(kind_of(32, False))) <= world.best_ns(32) * (1 + GAIN_MIN)


@pytest.mark.parametrize("hidden", [0.0, 0.3])
def test_one_is_kept_where_overlap_does_not_come_true(hidden: float) -> None:
    """Two cores for three processes: what is predicted to run at once takes turns."""
    choice = MicrobatchChoice("auto", LAYERS)
    chosen = World(FAST_LINK, hidden).run(choice, [8] * 2000)
    assert choice.current(kind_of(8, False)) == 1
    assert chosen.count(1) / len(chosen) > 0.98


def test_kinds_and_sizes_are_chosen_for_on_their_own() -> None:
    choice = MicrobatchChoice("auto", LAYERS)
    World(SLOW_LINK).run(choice, [32] * 2000)
    World(FAST_LINK, 0.0).run(choice, [256] * 500, has_prompts=True)
    assert choice.current(kind_of(32, False)) > 1
    assert choice.current(kind_of(256, True)) == 1
    assert {(said["kind"], said["rows_max"]) for said in choice.explain()} == {("decode", 32), ("prefill", 256)}


positive = st.floats(0.5, 500)
any_costs = st.builds(
    lambda *c: costs((c[0], c[1]), (c[2], c[3]), (c[4], c[5])), *[positive] * 5, st.floats(0.5, 3000)
)


@settings(max_examples=20)
@given(any_costs, st.floats(0, 1), st.integers(2, 128))
def test_it_converges_to_the_best_of_any_costs_and_stays(truth: Costs, hidden: float, rows: int) -> None:
    """Within 2,000 steps, however much of the overlap comes true, and then no step but trials is anything else."""
    choice = MicrobatchChoice("auto", LAYERS)
    world, kind = World(truth, hidden), kind_of(rows, False)
    world.run(choice, [rows] * 2000)
    settled = choice.current(kind)
    assert world.step_ns(rows, settled) <= world.best_ns(rows) * 1.10
    later = world.run(choice, [rows] * 2000)
    assert choice.current(kind) == settled
    assert sum(m != settled for m in later) < 0.05 * len(later)


@settings(max_examples=20)
@given(any_costs, st.floats(0, 1), st.integers(0, 9), st.floats(0, 0.5))
def test_exploring_costs_at_most_its_share_of_time(truth: Costs, hidden: float, seed: int, noise: float) -> None:
    """By its own books, noise included, but for the one step that overdraws."""
    choice = MicrobatchChoice("auto", LAYERS)
    world = World(truth, hidden, noise, seed)
    for _ in range(20):
        before_ns = choice.loss_ns
        world.run(choice, [32] * 100)
        dearest_ns = max(world.step_ns(32, m) for m in range(1, MICROBATCHES_MAX + 1)) * (1 + noise)
        assert choice.loss_ns <= max(before_ns, LOSS_MAX * choice.steps_ns + dearest_ns)


@settings(max_examples=10)
@given(any_costs, st.integers(0, 99))
def test_it_does_not_flap_under_noise(truth: Costs, seed: int) -> None:
    """Switches grow with the logarithm of steps, for pauses double."""
    choice = MicrobatchChoice("auto", LAYERS)
    World(truth, 0.5, 0.3, seed).run(choice, [32] * 3000)
    assert choice.explain()[0]["switches"] <= 8


def test_costs_that_change_are_noticed() -> None:
    choice = MicrobatchChoice("auto", LAYERS)
    World(SLOW_LINK).run(choice, [32] * 2000)
    assert choice.current(kind_of(32, False)) > 1
    World(FAST_LINK, 0.0).run(choice, [32] * 8000)
    assert choice.current(kind_of(32, False)) == 1


def test_what_it_knows_is_bounded() -> None:
    choice = MicrobatchChoice("auto", LAYERS)
    chance = random.Random(7)
    World(SLOW_LINK, noise=0.2).run(choice, [chance.randint(1, 1024) for _ in range(2000)])
    World(SLOW_LINK, noise=0.2).run(choice, [chance.randint(1, 1024) for _ in range(2000)], has_prompts=True)
    assert len(choice.explain()) <= 2 * 11


def test_no_more_than_there_are_sequences() -> None:
    choice = MicrobatchChoice("auto", LAYERS)
    assert set(World(SLOW_LINK).run(choice, [1] * 3000)) == {1}
    assert max(World(SLOW_LINK).run(choice, [2] * 3000)) == 2


def test_a_number_is_kept_whatever_is_measured() -> None:
    choice = MicrobatchChoice(3, LAYERS)
    assert set(World(FAST_LINK).run(choice, [8] * 100)) == {3}


# --- the formula ---------------------------------------------------------------------------------


def simulated(truth: Costs, rows: int, m: int) -> float:
    """The order of work under virtual time: one attention worker, one expert worker, and for the exchange a wire
    of the faulty transport each way, where a row is a byte."""
    attention, experts = truth.attention.at(rows / m), truth.experts.at(rows / m)
    faults = Faults(latency_s=truth.exchange.fixed / 2, bytes_per_s=2 / truth.exchange.slope)
    out, back, leg = Wire(faults), Wire(faults), Leg(False, False, 0.0)
    now = free = 0.0
    there: dict[int, float] = {}
    for work in ping_pong(LAYERS, m):
        if work.op == "dispatch":
            now += attention
            free = max(free, out.arrival_s(now, rows // m, leg)) + experts
            there[work.microbatch] = back.arrival_s(free, rows // m, leg)
        else:
            now = max(now, there[work.microbatch])
    return now


@given(any_costs, st.integers(1, 4))
def test_the_formula_is_what_the_order_of_work_takes(truth: Costs, m: int) -> None:
    """Within 15 %, for any costs and any link; exactly, for one microbatch."""
    took, said = simulated(truth, 48, m), step_cost(truth, 48, m, LAYERS)
    assert said == pytest.approx(took, rel=1e-6 if m == 1 else 0.15)


def test_two_microbatches_hide_a_slow_link() -> None:
    """Costs that grow with rows: one slice's round goes on within the other's, and three hide more than two."""
    link = costs((10, 0), (10, 0), (1e-9, 240))
    each = 48 * 10 * US
    assert simulated(link, 48, 1) == pytest.approx(LAYERS * (2 * each + 240 * US))
    assert simulated(link, 48, 2) == pytest.approx(LAYERS * (each + 240 * US) + each / 2)
    assert simulated(link, 48, 3) == pytest.approx(LAYERS * (2 * each / 3 + 240 * US) + 2 * each / 3)


def test_the_papers_condition() -> None:
    """m >= 2 (1 + T_c / T_f), one way: three microbatches while T_c is below half of T_f, four up to T_f."""
    even = lambda one_way: costs((0, 100), (0, 100), (0, 2 * one_way))  # noqa: E731
    assert hides_from(even(0), 1) == pytest.approx(2)
    assert hides_from(even(50), 1) == pytest.approx(3)
    assert hides_from(even(100), 1) == pytest.approx(4)


def test_a_line_is_found_and_costs_at_one_size_are_all_taken_to_grow() -> None:
    fit = Fit()
    assert fit.line() is None
    fit.add(10, 300)
    fit.add(10, 300)
    assert fit.line() == Affine(30, 0)
    for rows in (5, 20, 40):
        fit.add(rows, 100 + 20 * rows)
    line = fit.line()
    assert line is not None
    assert line == (pytest.approx(20), pytest.approx(100))


# --- the setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), [("auto", "auto"), (1, 1), ("2", 2), (4, 4)])
def test_the_setting_is_auto_or_a_number(given: object, meant: object) -> None:
    assert AttentionConfig.model_validate({"microbatches": given}).microbatches == meant
    assert AttentionConfig().microbatches == "auto"


@pytest.mark.parametrize("wrong", [0, 5, "two", "-1", True, 1.5, None])
def test_other_settings_are_refused_with_what_is_accepted(wrong: object) -> None:
    with pytest.raises(ValueError, match="accepted: auto, or 1 to 4"):
        AttentionConfig.model_validate({"microbatches": wrong})

"""Promises of admission: a time to first token that is kept, and a Retry-After that is meant."""

from __future__ import annotations

import pytest

from cluster.scheduler.admission import Appointments
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import Accept, FinishReason
from tests.unit.scheduler_story import W0, Story, attempt


def test_time_in_which_nobody_waits_does_not_make_the_service_look_slow() -> None:
    """A burst after a quiet hour is judged by what can be served, not by what was asked for."""
    story = Story(W0, config=SchedulerConfig(first_token_s=2.0))
    for n in range(20):
        story.submit(f"r{n}")
        story.round()
        story.now_s += 0.1
        story.complete(W0, attempt(f"r{n}"))
        for _ in range(30):
            story.now_s += 0.9
            story.round()
    answers = [story.submit(f"x{n}")[0] for n in range(40)]
    admitted = sum(isinstance(answer, Accept) for answer in answers)
    assert 18 <= admitted <= 24  # ten a second for two seconds


def test_what_was_placed_and_has_no_token_yet_counts_for_the_promise() -> None:
    """Wherever a prompt waits, at the scheduler or at its worker, it is waited for."""
    story = Story(W0, config=SchedulerConfig(first_token_s=2.0))
    for n in range(60):
        story.submit(f"r{n}")
        story.round()
        story.now_s += 0.1
        if n:
            story.complete(W0, attempt(f"r{n - 1}"))
    answers = []
    for n in range(60):
        answers += story.submit(f"x{n}")
        story.round()
    admitted = [answer for answer in answers if isinstance(answer, Accept)]
    assert 17 <= len(admitted) <= 24
    assert story.scheduler.snapshot()["worker/attention-0/held"] > 1  # not all of them wait in the queue


def test_those_that_are_refused_are_told_to_come_one_after_the_other() -> None:
    """At the rate at which room comes free, within the bound: so that who comes when told finds it."""
    config = SchedulerConfig(queued_requests_max=10, retry_after_s_min=2, retry_after_s_max=30)
    appointments = Appointments()
    told = [appointments.after(2.0, 4.0, 100.0, config) for _ in range(200)]
    assert told[:5] == pytest.approx([2.0, 2.25, 2.5, 2.75, 3.0])
    assert max(told) == 30
    assert appointments.after(2.0, 4.0, 129.0, config) == pytest.approx(2.0)  # those have come by then


def test_short_prompts_after_long_ones_are_not_taken_for_long() -> None:
    """Few long prompts end in a second; that says nothing against a handful of short ones."""
    story = Story(W0, config=SchedulerConfig(first_token_s=2.0))
    for n in range(12):
        story.submit(f"long{n}", num_prompt=400)
        story.round()
        for _ in range(4):
            story.now_s += 0.5
            story.round()
        story.complete(W0, attempt(f"long{n}"))
    answers = [story.submit(f"short{n}", num_prompt=4)[0] for n in range(16)]
    assert all(isinstance(answer, Accept) for answer in answers)
    answers = [story.submit(f"more{n}", num_prompt=400)[0] for n in range(16)]
    assert sum(isinstance(answer, Accept) for answer in answers) <= 4


def test_what_ends_while_nobody_waits_does_not_make_the_service_look_fast() -> None:
    """A burst after a quiet while: not one of those admitted waits much longer than promised. Eight places,
    answers of five seconds; a quarter of them asked for at first, more than twice as many then."""
    story = Story(W0, config=SchedulerConfig(first_token_s=15.0))
    came, ends, waits = {}, [], []
    for tick in range(1600):
        story.now_s += 0.25
        is_burst = tick >= 1200
        if tick % 10 == 0 or is_burst:
            name = f"r{tick}"
            if isinstance(story.submit(name)[0], Accept):
                came[name] = tick
        done = [name for at, name in ends if at + 20 == tick]
        story.report(
            W0, prompts_done=[attempt(name) for at, name in ends if at + 1 == tick],
            completions=[(attempt(name), FinishReason.LENGTH, "", 10) for name in done],
        )  # fmt: skip
        ends = [(at, name) for at, name in ends if name not in done]
        started = story.started(story.round()).get(W0, [])
        ends += [(tick, name) for name in started]
        waits += [(tick - came[name]) / 4 for name in started]
    assert max(waits) <= 1.2 * 15.0
    assert len(came) > 120 + 400 / 4 * 1.6  # eight places were never empty in the burst

"""Stories of the scheduler: what a new term, or one that was frozen, finds and does."""

from __future__ import annotations

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    Accept,
    CloseAttempt,
    CloseReason,
    FinishReason,
    GatewayJoined,
    GatewayLost,
    Incarnation,
    MembersExpected,
    Running,
    WorkerLost,
)
from tests.unit.scheduler_story import W0, W1, G, Story, attempt, closed, running, two_running


def reborn(*expected: Incarnation) -> Story:
    """A new term, its gateway back, no worker yet."""
    return Story(expected=frozenset(expected), term=2)


def test_a_new_term_places_nothing_before_every_expected_worker_was_heard() -> None:
    """What a worker runs is claimed by its gateway and goes on undisturbed; the rest is placed after."""
    story = reborn(W0, W1)
    story.resume("runs", attempt=1, num_accepted=3)
    story.resume("waited", attempt=1)
    story.join(W0, state=(running("runs"),))
    story.join(W1)
    story.round()
    assert (story.plans[W0].number, story.plans[W0].send_state) == (1, True)
    story.report(W0, state=(running("runs"),))
    assert story.round() == []
    story.report(W1, state=())
    assert story.started(story.round()) == {W1: ["waited"]}


def test_what_an_older_terms_plan_started_after_the_hello_is_found_by_the_first_answer() -> None:
    """Only once a worker has the new term can no older order change what it runs."""
    story = reborn(W0, W1)
    story.resume("a", attempt=1)
    story.join(W0)
    story.join(W1)
    story.round()
    story.report(W1, state=())
    story.report(W0, state=(running("a"),))
    assert story.started(story.round()) == {}
    assert story.scheduler.snapshot()["waiting"] == 0


def test_newcomers_of_a_new_term_do_not_outrank_what_runs() -> None:
    """A worker whose pool is dry pauses the last arrived: arrivals grow over terms, and a resume keeps its own."""
    story = Story(W0, term=1)
    for name in "xyzab":
        story.submit(name)
    story.round()
    ran = {start.attempt.request_id: start.arrival for start in story.plans[W0].starts[-2:]}
    story = reborn(W0)
    story.resume("a", attempt=1)  # claimed before its worker is heard
    state = tuple(Running(attempt(name), 40, True, arrival, arrival) for name, arrival in ran.items())
    story.join(W0, state=state)
    story.round()
    story.report(W0, state=state)
    story.resume("b", attempt=1)  # and after
    story.submit("new")
    for name in "ab":  # both are given back, and resumed
        story.report(W0, completions=((attempt(name), FinishReason.CANCELLED, ""),))
        story.resume(name, attempt=2)
    story.round()
    starts = {start.attempt.request_id: start.arrival for start in story.plans[W0].starts}
    assert [starts["a"], starts["b"]] == [ran["a"], ran["b"]]
    assert starts["new"] > max(ran.values())


def test_a_gateway_that_claims_late_finds_its_sequence_running() -> None:
    story = reborn(W0)
    story.join(W0, state=(running("a"),))
    story.round(after_s=1.0)
    assert story.resume("a", attempt=1) == [Accept(G, "a", 0)]
    for _ in range(10):
        assert story.round(after_s=1.0) == []


def test_what_no_gateway_claims_is_stopped_when_a_lease_would_have_ended() -> None:
    story = reborn(W0)
    story.join(W0, state=(running("a"),))
    for _ in range(5):
        story.round(after_s=1.0)
    assert story.plans[W0].stops == (attempt("a"),)
    assert closed(story.resume("a", attempt=1)) == [("a/0@1", CloseReason.WORKER_LOST)]


def test_of_two_workers_claims_the_higher_attempt_wins() -> None:
    story = reborn(W0, W1)
    story.join(W0, state=(running("a", 1),))
    story.join(W1, state=(running("a", 2),))
    story.round()
    assert (story.plans[W0].stops, story.plans[W1].stops) == ((attempt("a", 1),), ())
    assert closed(story.resume("a", attempt=1)) == [("a/0@1", CloseReason.WORKER_LOST)]


def test_after_the_deadline_what_may_run_at_a_missing_worker_gets_a_new_number() -> None:
    """It may still be alive and running: the old number is never placed again."""
    story = reborn(W0, W1)
    story.join(W0)
    story.round()
    story.report(W0, state=())
    story.resume("a", attempt=1)
    for _ in range(9):
        assert story.round(after_s=1.0) == []
    assert closed(story.round(after_s=1.0)) == [("a/0@1", CloseReason.WORKER_LOST)]
    assert closed(story.resume("b", attempt=3)) == [("b/0@3", CloseReason.WORKER_LOST)]
    assert closed(story.resume("b", attempt=4)) == []
    assert closed(story.submit("fresh")) == []
    assert story.started(story.round()) == {W0: ["b", "fresh"]}
    story.tell(MembersExpected(frozenset({W0})))  # the missing one is dead: nothing is unseen
    assert closed(story.resume("c", attempt=1)) == []


def test_what_entered_unjudged_and_can_never_fit_is_told_when_the_first_worker_joins() -> None:
    story = reborn(W0)
    assert story.submit("a", num_prompt=600) == [Accept(G, "a", 0)]
    story.join(W0)
    closing = [c for c in story.round() if isinstance(c, CloseAttempt)]
    assert closing[0].reason is CloseReason.FAILED
    assert "prompt of 600 tokens" in closing[0].detail
    assert "at most 512" in closing[0].detail


def test_after_a_gap_in_its_own_clock_nobody_is_judged_before_being_heard() -> None:
    """It was the scheduler that was frozen: links that broke meanwhile have their full time to return."""
    story = two_running()
    story.now_s += 60
    story.tell(WorkerLost(W0))
    story.tell(GatewayLost(G))
    story.now_s += 60
    assert story.round() == []
    story.join(W0, state=(running("a"),))
    story.tell(GatewayJoined(G, "unix:g0"))
    assert closed(story.round(after_s=0.9)) == []
    gauges = story.scheduler.snapshot()
    assert (gauges["clock_gaps_total"], gauges["running"]) == (2, 2)


def test_a_gap_counts_neither_as_recovery_nor_as_waiting() -> None:
    story = Story(expected=frozenset({W0}), config=SchedulerConfig(queue_wait_s_max=20))
    story.resume("a", attempt=1)
    story.now_s += 60
    assert story.round() == []
    story.join(W0)
    story.round()
    story.report(W0, state=())
    assert story.started(story.round()) == {W0: ["a"]}

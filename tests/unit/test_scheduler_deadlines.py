"""Stories of the scheduler: a request's time is up, wherever it is."""

from __future__ import annotations

from dataclasses import replace

from cluster.scheduler.events import CloseReason, RejectCode
from tests.unit.scheduler_story import LIMITS, W0, Story, attempt, closed, running, siblings

ONE_PLACE = replace(LIMITS, sequences_max=1)


def test_a_deadline_ends_a_request_in_the_queue_and_while_it_runs() -> None:
    """All of its siblings; what runs is stopped, and its place is another's."""
    story = Story(W0, limits=ONE_PLACE)
    story.submit("runs", siblings=siblings(2), time_left_s=5.0)
    story.submit("waits", time_left_s=4.0)
    story.submit("next")
    assert story.started(story.round()) == {W0: ["runs"]}
    for _ in range(4):
        assert closed(story.round(after_s=0.9)) == []
    assert closed(story.round(after_s=0.5)) == [("waits/0@1", CloseReason.DEADLINE)]
    ended = closed(story.round(after_s=0.9))
    assert ended == [("runs/0@1", CloseReason.DEADLINE), ("runs/1@1", CloseReason.DEADLINE)]
    assert story.plans[W0].stops == (attempt("runs"),)
    story.complete(W0, attempt("runs"))
    assert story.started(story.round()) == {W0: ["next"]}


def test_a_request_without_a_deadline_has_all_the_time_there_is() -> None:
    story = Story(W0)
    story.submit("a")
    story.round()
    for _ in range(1000):
        assert story.round(after_s=0.99) == []
    assert story.scheduler.snapshot()["running"] == 1


def test_a_further_attempt_has_no_more_time_than_the_first() -> None:
    """While another of its sequences is open, what was said first counts."""
    story = Story(W0)
    story.submit("a", siblings=siblings(2), time_left_s=1.0)
    story.round()
    story.report(W0, completions=[(attempt("a"), 3)])
    story.resume("a", attempt=2, num_accepted=1, time_left_s=9.0)
    story.round(after_s=0.9)
    assert closed(story.round(after_s=0.2)) == [("a/1@1", CloseReason.DEADLINE), ("a/0@2", CloseReason.DEADLINE)]


def test_a_new_scheduler_is_told_how_much_time_is_left() -> None:
    story = Story(expected=frozenset({W0}), term=2)
    story.join(W0, state=(running("a"),))
    story.round()
    story.report(W0, state=(running("a"),))
    story.resume("a", attempt=1, num_accepted=3, time_left_s=2.0)
    story.round(after_s=0.9)
    story.round(after_s=0.9)
    assert closed(story.round(after_s=0.9)) == [("a/0@1", CloseReason.DEADLINE)]
    assert story.plans[W0].stops == (attempt("a"),)


def test_what_would_not_begin_before_its_deadline_is_refused_at_once() -> None:
    story = Story(W0, limits=ONE_PLACE)
    for name in "abcdefgh":
        story.submit(name)
    story.round()
    for name in "ab":
        story.complete(W0, attempt(name))
        story.round(after_s=0.5)
    (refused,) = story.submit("late", time_left_s=0.5)
    assert refused.code is RejectCode.OVERLOADED  # type: ignore[union-attr]
    assert "its deadline is 0.5 s" in refused.message  # type: ignore[union-attr]
    assert refused.retry_after_s >= 1  # type: ignore[union-attr]


def test_deadlines_of_what_has_ended_are_swept_out() -> None:
    """The scheduler remembers no more of them than of requests."""
    story = Story(W0)
    for number in range(3000):
        story.submit(f"r{number}", time_left_s=3600.0)
        story.round()
        story.complete(W0, attempt(f"r{number}"))
    assert len(story.scheduler._books._deadlines) < 1100

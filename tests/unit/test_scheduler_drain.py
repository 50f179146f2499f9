"""Stories of the scheduler: a worker is emptied."""

from __future__ import annotations

from dataclasses import replace

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import CloseReason, MembersExpected, WorkerLost
from tests.unit.scheduler_story import LIMITS, W0, W1, Story, attempt, closed, running, two_running

ROOM_FOR_TWO = replace(LIMITS, sequences_max=2)


def drain(story: Story, *workers: object) -> None:
    story.tell(MembersExpected(frozenset({W0, W1}), frozenset(workers)))  # type: ignore[arg-type]


def test_a_draining_worker_is_told_once_and_given_nothing_more() -> None:
    """Whatever room it has. Called off, it is told so, and is filled again."""
    story = Story(W0, W1)
    drain(story, W0)
    story.round()
    assert (story.plans[W0].draining, story.plans[W1].draining) == (True, False)
    for name in "abcd":
        story.submit(name)
    assert story.started(story.round()) == {W1: ["a", "b", "c", "d"]}
    assert story.round() == []
    drain(story)
    story.submit("e")
    assert story.started(story.round()) == {W0: ["e"]}
    assert not story.plans[W0].draining


def test_what_runs_there_goes_on_where_there_is_room_and_nobody_takes_that_room() -> None:
    story = Story(W0, W1, limits=ROOM_FOR_TWO)
    for name in "abcd":
        story.submit(name)
    story.round()
    story.complete(W1, attempt("b"))
    drain(story, W0)
    assert closed(story.round()) == [("c/0@1", CloseReason.PREEMPTED)]  # the latest: it loses least
    assert story.plans[W0].stops == (attempt("c"),)
    story.submit("new")
    assert story.started(story.round()) == {}  # W1's last place is kept
    story.resume("c", attempt=2, num_accepted=3)
    assert story.started(story.round()) == {W1: ["c"]}
    story.complete(W1, attempt("d"))
    assert closed(story.round()) == [("a/0@1", CloseReason.PREEMPTED)]


def test_what_fits_nowhere_else_stays_and_finishes() -> None:
    story = Story(W0, W1, limits=replace(LIMITS, sequences_max=1))
    story.submit("a")
    story.submit("b")
    story.round()
    drain(story, W0)
    assert closed(story.round()) == []
    assert story.scheduler.snapshot()["worker/attention-0/held"] == 1
    story.complete(W0, attempt("a"))
    assert story.scheduler.snapshot()["worker/attention-0/held"] == 0


def test_room_that_nobody_comes_for_is_given_to_others() -> None:
    """The client hung up meanwhile."""
    story = Story(W0, W1, limits=replace(LIMITS, sequences_max=1))
    story.submit("a")
    story.round()
    drain(story, W0)
    assert closed(story.round()) == [("a/0@1", CloseReason.PREEMPTED)]
    story.submit("b")
    assert story.started(story.round()) == {}
    for _ in range(6):
        story.round(after_s=0.9)
    assert story.started(story.round()) == {} != story.plans[W1].starts
    assert [start.attempt for start in story.plans[W1].starts] == [attempt("b")]


def test_it_may_be_left_to_finish_what_it_has() -> None:
    story = Story(W0, W1, config=SchedulerConfig(drain="finish"))
    story.submit("a")
    story.round()
    drain(story, W0)
    assert closed(story.round()) == []
    assert story.plans[W0].draining


def test_a_new_scheduler_drains_on() -> None:
    """It knows from the worker, until the controller says; and what nobody has claimed stays where it is."""
    story = Story(expected=frozenset({W0, W1}), term=2)
    fresh = Story(term=2, expected=frozenset())
    fresh.tell(MembersExpected(frozenset({W0, W1}), frozenset({W0})))
    for one in (story, fresh):
        one.join(W0, state=(running("old"),), draining=one is story)
        one.join(W1)
        one.round()
    assert fresh.plans[W0].draining
    assert not story.plans[W0].draining  # its controller has said that none is
    silent = Story(term=2)
    silent.scheduler._workers._draining = None  # nothing was heard of the controller
    silent.join(W0, draining=True)
    silent.round()
    assert silent.plans[W0].draining


def test_a_worker_whose_link_broke_is_told_again_that_it_drains() -> None:
    """The plan that said so may have been lost with it."""
    story = Story(W0, W1)
    drain(story, W0)
    story.round()
    assert story.plans[W0].draining
    story.tell(WorkerLost(W0))
    del story.plans[W0]
    story.join(W0, term=1, plan_number=1, draining=False)
    story.round()
    assert story.plans[W0].draining


def test_two_draining_workers_keep_what_they_have() -> None:
    story = two_running()
    drain(story, W0, W1)
    assert closed(story.round()) == []
    story.submit("c")
    assert story.started(story.round()) == {}


def test_what_only_a_draining_worker_could_hold_keeps_nobody_waiting() -> None:
    story = Story(W0)
    story.limits = replace(LIMITS, model_len_max=100)
    story.tell(MembersExpected(frozenset({W0, W1})))
    story.join(W1)
    story.round()
    story.report(W1, state=())
    drain(story, W0)
    story.submit("long", num_prompt=200)
    story.submit("short")
    assert story.started(story.round()) == {W1: ["short"]}

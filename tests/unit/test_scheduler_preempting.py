"""Stories of the scheduler: what is urgent finds everything full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import CloseReason
from tests.unit.scheduler_story import LIMITS, W0, W1, Story, attempt, closed, running

ONE_PLACE = replace(LIMITS, sequences_max=1)


def full(*named: tuple[str, int], **config: float) -> Story:
    """One sequence at each worker, with these priorities."""
    story = Story(W0, W1, limits=ONE_PLACE, config=SchedulerConfig(**config))  # type: ignore[arg-type]
    for name, priority in named:
        story.submit(name, priority=priority)
    story.round()
    return story


def after_a_while(story: Story) -> list[tuple[str, CloseReason]]:
    return closed(story.round(after_s=0.6)) + closed(story.round(after_s=0.6))


def test_the_lowest_priority_of_all_workers_gives_way_and_goes_on_next() -> None:
    story = full(("a", 1), ("b", 2))
    story.submit("other", priority=3)
    story.submit("urgent", priority=0)
    assert after_a_while(story) == [("b/0@1", CloseReason.PREEMPTED)]
    assert story.plans[W1].stops == (attempt("b"),)
    story.resume("b", attempt=2, num_accepted=4, priority=2)
    story.complete(W1, attempt("b"))
    assert story.started(story.round()) == {W1: ["urgent"]}  # before the one that gave way
    story.complete(W0, attempt("a"))
    assert story.started(story.round()) == {W0: ["b"]}  # and that, before all that wait


def test_of_equals_the_one_that_has_least_to_compute_again_gives_way() -> None:
    story = Story(W0, W1, limits=ONE_PLACE)
    story.submit("long", num_prompt=100, priority=1)
    story.submit("short", num_prompt=10, priority=1)
    story.round()
    for name, worker in (("long", W0), ("short", W1)):
        story.report(worker, prompts_done=(attempt(name),))
    story.submit("urgent")
    assert after_a_while(story) == [("short/0@1", CloseReason.PREEMPTED)]


def test_blocks_are_made_room_for_as_places_are() -> None:
    """As many give way as it needs, and no more."""
    story = Story(W0)
    for name in "abcd":
        story.submit(name, num_prompt=200, priority=5)
    story.round()
    story.free[W0] = 64 - 4 * 13
    story.report(W0, prompts_done=[attempt(name) for name in "abcd"])
    story.submit("urgent", num_prompt=400)
    assert after_a_while(story) == [("d/0@1", CloseReason.PREEMPTED), ("c/0@1", CloseReason.PREEMPTED)]


@pytest.mark.parametrize("priority", [1, 2])
def test_nobody_gives_way_to_an_equal_or_lower_priority(priority: int) -> None:
    story = full(("a", 1), ("b", 1))
    story.submit("c", priority=priority)
    assert after_a_while(story) == []


def test_nobody_gives_way_at_once() -> None:
    story = full(("a", 1), ("b", 1))
    story.submit("urgent")
    assert closed(story.round(after_s=0.9)) == []
    assert closed(story.round(after_s=0.2)) != []


def test_priority_takes_no_other_tenants_turn() -> None:
    """Whose turn it is, shares decide: an urgent request of a tenant that was served more calls nobody."""
    story = full(("a", 5), ("b", 5))
    story.submit("patient", tenant="poor", priority=9)
    story.submit("urgent", priority=-9)
    assert after_a_while(story) == []


def test_a_sequence_gives_way_a_bounded_number_of_times() -> None:
    """Starvation is bounded: two urgent ones may pass, the third waits."""
    story = Story(W0, limits=ONE_PLACE, config=SchedulerConfig(yields_max=2))
    story.submit("low", priority=9)
    story.round()
    for number in (1, 2):
        story.submit(f"urgent{number}")
        assert after_a_while(story) == [(f"low/0@{number}", CloseReason.PREEMPTED)]
        story.resume("low", attempt=number + 1, num_accepted=number, priority=9)
        story.complete(W0, attempt("low", number))
        assert story.started(story.round()) == {W0: [f"urgent{number}"]}
        story.complete(W0, attempt(f"urgent{number}"))
        assert story.started(story.round()) == {W0: ["low"]}
    story.submit("urgent3")
    assert after_a_while(story) == []


def test_nobody_is_called_while_one_that_gave_way_waits() -> None:
    story = full(("other", 1), ("low", 9))
    story.submit("urgent1")
    assert after_a_while(story) == [("low/0@1", CloseReason.PREEMPTED)]
    story.resume("low", attempt=2, num_accepted=1, priority=9)
    story.complete(W1, attempt("low"))
    assert story.started(story.round()) == {W1: ["urgent1"]}
    story.submit("urgent2")
    assert after_a_while(story) == []
    story.complete(W1, attempt("urgent1"))
    assert story.started(story.round()) == {W1: ["low"]}
    assert after_a_while(story) == [("low/0@2", CloseReason.PREEMPTED)]


def test_a_new_scheduler_knows_who_may_be_asked_once_its_gateway_has_said() -> None:
    """And shares, too: who runs already has been served."""
    story = Story(expected=frozenset({W0}), term=2, limits=ONE_PLACE)
    story.join(W0, state=(running("old"),))
    story.round()
    story.report(W0, state=(running("old"),))
    story.submit("urgent", tenant="b", priority=0)
    assert after_a_while(story) == []  # nobody has claimed it: how urgent it is is not known
    story.resume("old", attempt=1, num_accepted=2, priority=7, tenant="a")
    story.submit("mine", tenant="a", priority=-5)
    assert [e.submission.request_id for e in story.scheduler._books.queue] == ["urgent", "mine"]
    assert after_a_while(story) == [("old/0@1", CloseReason.PREEMPTED)]


def test_who_is_paused_loses_nothing_and_is_asked_first() -> None:
    """A worker out of blocks takes nothing while one is paused, so that one has to go."""
    story = Story(W0)
    for name in "abc":
        story.submit(name, num_prompt=200, priority=5)
    story.round()
    story.free[W0] = 20
    story.report(W0, prompts_done=[attempt(n) for n in "abc"], paused=(attempt("b"),), num_paused=1)
    story.submit("urgent")
    assert after_a_while(story) == [("b/0@1", CloseReason.PREEMPTED)]


def test_who_was_paused_and_runs_again_loses_as_much_as_others() -> None:
    story = Story(W0)
    for name, num_prompt in (("long", 200), ("short", 100)):
        story.submit(name, num_prompt=num_prompt, priority=5)
    story.round()
    story.report(W0, prompts_done=[attempt("short")], paused=(attempt("long"),), num_paused=1)
    story.free[W0] = 2
    story.report(W0, prompts_done=[attempt("long")])
    story.submit("urgent", num_prompt=60)
    assert after_a_while(story) == [("short/0@1", CloseReason.PREEMPTED)]


def test_who_is_called_waits_no_longer_than_anybody() -> None:
    """Though nobody has given way yet: it is still the one that has waited longest."""
    story = full(("a", 1), ("b", 1), queue_wait_s_max=10.0, preempt_after_s=5.0)
    story.submit("urgent", priority=0)
    for _ in range(5):
        story.round(after_s=0.9)
    story.submit("later", priority=1)
    ended = [closed(story.round(after_s=0.9)) for _ in range(7)]
    assert ended[0] == [("a/0@1", CloseReason.PREEMPTED)]
    assert ended[-1] == [("urgent/0@1", CloseReason.FAILED)]

"""Stories of the scheduler: plans, the queue, placement."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    Accept,
    AttemptId,
    CancelRequested,
    CloseReason,
    DropLink,
    FinishReason,
    GatewayJoined,
    Submitted,
    Welcome,
)
from tests.unit.scheduler_peers import submission
from tests.unit.scheduler_story import LIMITS, W0, W1, G, Story, attempt, closed, siblings

NO_ROOM = replace(LIMITS, sequences_max=1)


def only(commands: list, kind: type) -> list:
    return [command for command in commands if isinstance(command, kind)]


# --- plans -----------------------------------------------------------------------------------------


def test_a_burst_makes_one_plan_per_worker_and_then_silence() -> None:
    """Messages grow with what changes, not with what runs."""
    story = Story(W0, W1)
    for name in ("a", "b", "c", "d"):
        assert story.submit(name) == [Accept(G, name, queued_before="abcd".index(name))]
    assert story.started(story.round()) == {W0: ["a", "c"], W1: ["b", "d"]}
    assert story.round(after_s=0.05) == []


def test_the_first_plan_of_a_term_goes_out_even_empty_and_numbers_have_no_gaps() -> None:
    """So that a worker refuses older terms from then on, and a lost plan is noticed."""
    story = Story(W0)
    assert story.plans[W0].number == 1
    assert story.plans[W0].send_state
    for number, name in enumerate("abc", start=2):
        story.submit(name)
        story.round()
        assert story.plans[W0].number == number
        assert not story.plans[W0].send_state


def test_a_start_carries_what_the_worker_needs() -> None:
    """The seed is the sibling's own, the spec travels unread."""
    story = Story(W0)
    story.resume("a", attempt=3, num_accepted=2, priority=4)
    story.round()
    (start,) = story.plans[W0].starts
    assert start.attempt == AttemptId("a", 0, 3)
    assert (start.gateway_address, start.seed, start.spec, start.priority) == ("unix:g0", 7, 10, 4)
    assert (len(start.prompt), start.accepted) == (10, (0, 1))


def test_a_plan_is_bounded_in_bytes_and_the_rest_goes_with_the_next() -> None:
    """No burst of long prompts makes a message that its receiver refuses."""
    config = SchedulerConfig(message_bytes_max=4096, plan_bytes_max=8192)
    story = Story(W0, config=config)
    for name in "abc":
        story.submit(name, num_prompt=100, siblings=siblings(1))
        big = replace(submission(name + "+", num_prompt=100), num_bytes=4000)
        story.tell(Submitted(G, big))
    assert story.started(story.round()) == {W0: ["a", "a+", "b"]}
    assert story.started(story.round()) == {W0: ["b+", "c"]}
    assert story.started(story.round()) == {W0: ["c+"]}


def test_what_a_plan_stops_counts_as_much_as_what_it_starts() -> None:
    story = Story(
        W0,
        limits=replace(LIMITS, sequences_max=32, blocks_total=640),
        config=SchedulerConfig(message_bytes_max=4096, plan_bytes_max=8192),
    )
    for number in range(12):
        story.submit(f"r{number}")
    story.round()
    for number in range(12):
        story.tell(CancelRequested(G, f"r{number}"))
    for name in "ab":
        story.tell(Submitted(G, replace(submission(name), num_bytes=4000)))
    assert story.started(story.round()) == {W0: ["a"]}
    assert len(story.plans[W0].stops) == 12
    assert story.started(story.round()) == {W0: ["b"]}


# --- order and placement ---------------------------------------------------------------------------


def test_lower_priority_first_then_resumes_then_arrival() -> None:
    """A resume's client is already reading; it goes ahead of its priority, not of others."""
    story = Story(W0, limits=NO_ROOM)
    story.submit("runs")
    story.round()
    story.submit("later", priority=1)
    story.submit("first")
    story.submit("second")
    assert story.resume("again", attempt=2) == [Accept(G, "again", queued_before=0)]
    order = []
    for done in ("runs", "again", "first", "second"):
        story.complete(W0, attempt(done, number=2 if done == "again" else 1))
        order += story.started(story.round())[W0]
    assert order == ["again", "first", "second", "later"]


def test_a_resume_keeps_its_arrival() -> None:
    """Of two resumes the one whose request came first goes first, in whatever order they come back."""
    story = Story(W0, W1)
    story.submit("old")
    story.submit("young")
    story.round()
    story.report(W0, undelivered=(attempt("old"),))
    story.report(W1, undelivered=(attempt("young"),))
    story.resume("young", attempt=2)
    story.resume("old", attempt=2)
    assert story.started(story.round()) == {W0: ["old"], W1: ["young"]}


def test_siblings_spread_over_workers_and_each_is_whole_on_one() -> None:
    """The least loaded worker comes first."""
    story = Story(W0, W1)
    story.submit("a", siblings=siblings(3))
    story.round()
    at = {worker: [start.attempt.index for start in plan.starts] for worker, plan in story.plans.items()}
    assert at == {W0: [0, 2], W1: [1]}


def test_among_equally_loaded_workers_the_one_with_most_room_is_chosen() -> None:
    story = Story(W0, W1)
    story.free[W0] = 30
    story.report(W0)
    story.submit("a")
    assert story.started(story.round()) == {W1: ["a"]}


def test_room_is_promised_until_the_prompt_is_done() -> None:
    """What was given since the last report, or is still being computed, is not given again."""
    story = Story(W0)  # 64 blocks
    story.submit("a", num_prompt=480)  # 31 blocks with its first token
    story.submit("b", num_prompt=480)
    story.submit("c", num_prompt=480)
    assert story.started(story.round()) == {W0: ["a", "b"]}
    story.free[W0] = 33  # the worker has taken blocks for a, b is not begun
    story.report(W0)
    assert story.started(story.round()) == {}
    story.report(W0, prompts_done=(attempt("a"),))
    assert story.scheduler.snapshot()["worker/attention-0/blocks_promised"] == 31
    story.free[W0] = 64
    story.report(W0, prompts_done=(attempt("b"),))
    assert story.started(story.round()) == {W0: ["c"]}


def test_there_must_be_room_in_both_block_spaces() -> None:
    """A prompt on sliding layers takes a window and a chunk, wherever they begin, however long it is."""
    limits = replace(LIMITS, blocks_total=512, sliding_window=20, sliding_blocks_total=9)
    story = Story(W0, limits=limits, config=SchedulerConfig(chunk_tokens_max=32))
    assert limits.blocks_for(480, 32) == (30, 5)  # 51 tokens in a row overlap 5 blocks of 16 at most
    assert limits.blocks_for(17, 32) == (2, 2)
    assert limits.blocks_for(480, 256) == (30, 9)  # the worker cuts its chunks to what it has
    story.submit("a", num_prompt=480)
    story.submit("b", num_prompt=480)
    assert story.started(story.round()) == {W0: ["a"]}
    assert story.scheduler.snapshot()["worker/attention-0/sliding_blocks_promised"] == 5
    story.free_sliding[W0] = 6  # what a still holds of its window
    story.report(W0, prompts_done=(attempt("a"),))
    assert story.started(story.round()) == {W0: ["b"]}


def test_a_long_prompt_at_the_head_is_not_overtaken() -> None:
    """Strict order: else short ones would keep it waiting for ever."""
    story = Story(W0)
    story.submit("big", num_prompt=480, siblings=siblings(2))
    story.round()
    story.submit("long", num_prompt=400)
    story.submit("short", num_prompt=1)
    assert story.round() == []
    story.complete(W0, attempt("big", index=0))
    assert story.started(story.round()) == {W0: ["long", "short"]}


def test_what_no_present_worker_could_ever_hold_is_passed_over() -> None:
    """A resume that waits for a larger worker does not stop the others."""
    story = Story(W0)
    story.resume("huge", attempt=2, num_prompt=2000)
    story.submit("small")
    assert story.started(story.round()) == {W0: ["small"]}
    assert story.scheduler.snapshot()["waiting"] == 1


def test_a_worker_with_a_paused_sequence_is_given_nothing() -> None:
    """It is out of blocks: what it has must come back first."""
    story = Story(W0)
    story.report(W0, num_paused=1)
    story.submit("a")
    assert story.round() == []
    story.report(W0, num_paused=0)
    assert story.started(story.round()) == {W0: ["a"]}


def test_a_stopped_sequence_takes_its_place_until_the_worker_says_it_has_ended() -> None:
    story = Story(W0, limits=NO_ROOM)
    story.submit("a")
    story.round()
    story.tell(CancelRequested(G, "a"))
    story.submit("b")
    story.round()
    assert (story.plans[W0].stops, story.plans[W0].starts) == ((attempt("a"),), ())
    story.report(W0, completions=((attempt("a"), FinishReason.CANCELLED, ""),))
    assert story.started(story.round()) == {W0: ["b"]}


def test_what_waits_too_long_is_given_up_with_a_reason() -> None:
    """No wait is unbounded."""
    story = Story(config=SchedulerConfig(queue_wait_s_max=3, tick_gap_s_max=10))
    story.resume("a", attempt=2)
    assert story.round(after_s=3) == []
    (end,) = story.round(after_s=0.1)
    assert (end.attempt, end.reason) == (attempt("a", 2), CloseReason.FAILED)
    assert "within 3 s" in end.detail


def test_a_worker_without_experts_is_given_nothing_until_they_are_there() -> None:
    """What it gives back opens its next attempt, and waits in the queue: no placing in vain, no error."""
    story = Story(W0, W1)
    story.submit("a")
    story.round()
    story.report(W1, experts_missing=True)
    lost = story.report(W0, experts_missing=True, completions=((attempt("a"), FinishReason.CANCELLED, ""),))
    assert closed(lost) == [("a/0@1", CloseReason.PREEMPTED)]
    story.resume("a", attempt=2)
    for _ in range(3):
        assert story.started(story.round(after_s=0.5)) == {}
    story.report(W1)
    assert story.started(story.round()) == {W1: ["a"]}


def test_a_wait_for_experts_that_was_too_long_says_so() -> None:
    """The queue's bound is the explained refusal."""
    story = Story(W0, config=SchedulerConfig(queue_wait_s_max=3, tick_gap_s_max=10))
    story.report(W0, experts_missing=True)
    story.submit("a")
    (end,) = story.round(after_s=3.1)
    assert end.reason is CloseReason.FAILED
    assert end.detail.endswith("within 3 s; experts are missing at attention-0#1")


def test_gateways_are_told_how_long_a_sequence_may_be() -> None:
    """When they join, and when it changes."""
    story = Story()
    assert story.tell(GatewayJoined(G, "unix:g0")) == [Welcome(G, 0)]
    story.join(W0)
    assert story.round()[0] == Welcome(G, 512)
    assert Welcome(G, 512) not in story.round()


def test_what_is_no_event_or_from_the_past_raises_and_changes_nothing() -> None:
    story = Story(W0)
    before = story.scheduler.snapshot()
    with pytest.raises(TypeError, match="not an event"):
        story.scheduler.step("submit", story.now_s)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is before"):
        story.scheduler.step(CancelRequested(G, "a"), story.now_s - 1)
    assert story.scheduler.snapshot() == before


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"plan_number": 9}, "plan 9 applied, 1 given"),
        ({"blocks_free": 65}, "65 blocks free of 64"),
        ({"sliding_blocks_free": 1}, "1 sliding blocks free of 0"),
    ],
)
def test_a_report_that_cannot_be_ends_the_stream(said: dict[str, int], why: str) -> None:
    """Joining again settles it; until then the worker is given nothing."""
    story = Story(W0)
    assert story.report(W0, **said) == [DropLink(W0, why)]
    story.submit("a")
    assert story.round() == []


def test_config_relations_are_checked() -> None:
    """A bound that contradicts another names both."""
    with pytest.raises(ValueError, match="chunk_tokens_max 600 must not exceed step_tokens_max 512"):
        SchedulerConfig(chunk_tokens_max=600)
    with pytest.raises(ValueError, match="at least twice message_bytes_max"):
        SchedulerConfig(plan_bytes_max=8192)

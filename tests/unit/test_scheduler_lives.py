"""Stories of the scheduler: how sequences end, and what becomes of them when somebody dies."""

from __future__ import annotations

from dataclasses import replace

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    Accept,
    CancelRequested,
    CloseAttempt,
    CloseReason,
    DropLink,
    FinishReason,
    FinishRequested,
    GatewayJoined,
    GatewayLost,
    Incarnation,
    MembersExpected,
    Submitted,
    WorkerLost,
)
from tests.unit.scheduler_peers import submission
from tests.unit.scheduler_story import LIMITS, W0, W1, G, Story, attempt, closed, running, siblings, two_running

NO_ROOM = replace(LIMITS, sequences_max=1)


# --- endings ---------------------------------------------------------------------------------------


def test_completions_make_room_and_duplicates_are_counted() -> None:
    story = Story(W0)
    story.submit("a")
    story.round()
    assert story.complete(W0, attempt("a")) == []
    assert story.complete(W0, attempt("a")) == []
    gauges = story.scheduler.snapshot()
    assert (gauges["running"], gauges["requests"], gauges["ignored_completions_total"]) == (0, 0, 1)


def test_a_resume_is_not_refused_because_the_scheduler_thought_it_finished() -> None:
    story = Story(W0)
    story.submit("a")
    story.round()
    story.complete(W0, attempt("a"))
    assert story.resume("a", attempt=1, num_accepted=9) == [Accept(G, "a", 0)]
    assert story.started(story.round()) == {W0: ["a"]}


def test_how_a_worker_ends_an_attempt_decides_what_its_gateway_is_told() -> None:
    """Lost or preempted: open the next. Failed: tell the client. Finished: it has the last token."""
    story = Story(W0)
    for name in ("failed", "dropped", "unreached"):
        story.submit(name)
    story.round()
    commands = story.report(
        W0,
        completions=(
            (attempt("failed"), FinishReason.FAILED, "no experts"),
            (attempt("dropped"), FinishReason.CANCELLED, ""),
        ),
        undelivered=(attempt("unreached"),),
    )
    assert [(c.attempt.request_id, c.reason) for c in commands] == [
        ("failed", CloseReason.FAILED),
        ("dropped", CloseReason.PREEMPTED),
        ("unreached", CloseReason.WORKER_LOST),
    ]
    assert commands[0].detail == "no experts"


def test_cancel_takes_a_request_from_queue_and_workers() -> None:
    story = Story(W0, limits=NO_ROOM)
    story.submit("a", siblings=siblings(2))
    story.round()
    story.tell(CancelRequested(G, "a"))
    story.round()
    assert story.plans[W0].stops == (attempt("a", index=0),)
    assert story.scheduler.snapshot()["waiting"] == 0


def test_a_finish_ends_one_sequence_only() -> None:
    story = Story(W0)
    story.submit("a", siblings=siblings(2))
    story.round()
    story.tell(FinishRequested(G, attempt("a", index=1)))
    story.round()
    assert story.plans[W0].stops == (attempt("a", index=1),)
    assert story.scheduler.snapshot()["requests"] == 1


def test_cancels_and_finishes_of_what_is_not_ones_own_are_ignored_and_counted() -> None:
    story = Story(W0)
    other = Incarnation("gateway-1", 1)
    story.tell(GatewayJoined(other, "unix:g1"))
    story.submit("a")
    story.round()
    story.tell(CancelRequested(other, "a"))
    story.tell(CancelRequested(G, "unknown"))
    story.tell(FinishRequested(G, attempt("a", number=2)))
    gauges = story.scheduler.snapshot()
    assert (gauges["ignored_cancels_total"], gauges["ignored_finishes_total"]) == (2, 1)
    assert story.round() == []
    (closed,) = story.tell(Submitted(other, submission("a")))
    assert (closed.to, closed.reason) == (other, CloseReason.FAILED)
    assert "in use by gateway-0#1" in closed.detail


def test_the_higher_attempt_wins_and_the_older_is_stopped() -> None:
    """Waiting or running; a lower one that comes late is closed."""
    story = Story(W0)
    story.submit("a")
    story.round()
    story.resume("a", attempt=2)
    story.round()
    assert [start.attempt for start in story.plans[W0].starts] == [attempt("a", 2)]
    assert story.plans[W0].stops == (attempt("a"),)
    late = story.resume("a", attempt=1)
    assert late[1:] == [CloseAttempt(G, attempt("a"), CloseReason.WORKER_LOST, "attempt 2 is already open")]
    assert closed(story.resume("a", attempt=2)) == []  # said twice: nothing new


# --- a worker's link ends ------------------------------------------------------------------------------


def test_a_lost_workers_sequences_are_given_back_and_resumed_elsewhere() -> None:
    """The gateway opens the next attempt with the tokens it has; the other worker's run on."""
    story = two_running()
    assert story.tell(WorkerLost(W0)) == []
    assert closed(story.round(after_s=0.2)) == []
    assert closed(story.round(after_s=0.05)) == [("a/0@1", CloseReason.WORKER_LOST)]
    story.resume("a", attempt=2, num_accepted=5)
    assert story.started(story.round()) == {W1: ["a"]}


def test_a_worker_that_returns_in_time_keeps_its_sequences() -> None:
    """Its link broke, not its life. Nothing is placed on it meanwhile, and numbers go on."""
    story = two_running()
    story.tell(WorkerLost(W0))
    story.submit("c", siblings=siblings(2))
    assert story.started(story.round()) == {W1: ["c", "c"]}
    assert story.join(W0, state=(running("a"),)) == []
    story.submit("d")
    story.round()
    assert story.plans[W0].number == 3
    assert closed(story.round(after_s=0.5)) == []


def test_what_a_returning_worker_does_not_run_is_given_back() -> None:
    """A plan that was under way when the link broke is lost; its number is used again."""
    story = two_running()
    lost = story.plans[W0]
    story.tell(WorkerLost(W0))
    commands = story.join(W0, plan_number=lost.number - 1)
    assert closed(commands) == [("a/0@1", CloseReason.WORKER_LOST)]
    story.resume("a", attempt=2)
    story.round()
    assert story.plans[W0].number == lost.number


def test_completions_said_with_the_hello_count_before_its_state() -> None:
    """What ended while the link was down has ended, not been lost."""
    story = two_running()
    story.tell(WorkerLost(W0))
    done = ((attempt("a"), FinishReason.STOP, ""),)
    assert story.join(W0, completions=done) == []


def test_a_stop_that_was_lost_with_the_link_is_said_again() -> None:
    story = two_running()
    story.tell(CancelRequested(G, "a"))
    story.round()
    story.tell(WorkerLost(W0))
    story.join(W0, state=(running("a"),), plan_number=story.plans[W0].number - 1)
    (again,) = story.round()
    assert again.plan.stops == (attempt("a"),)


def test_a_worker_that_returns_too_late_is_told_to_stop_what_went_on_without_it() -> None:
    """Two workers never both run a sequence for long; the gateway takes the newer attempt's tokens only."""
    story = two_running()
    story.tell(WorkerLost(W0))
    story.round(after_s=0.3)
    assert story.join(W0, state=(running("a"),)) == []
    story.round()
    assert story.plans[W0].stops == (attempt("a"),)


def test_a_gateway_ends_nothing_of_anothers() -> None:
    story = two_running()
    other = Incarnation("gateway-1", 1)
    story.tell(GatewayJoined(other, "unix:g1"))
    story.tell(FinishRequested(other, attempt("a")))
    story.tell(CancelRequested(other, "b"))
    assert story.round() == []
    assert story.scheduler.snapshot()["requests"] == 2


def test_a_new_life_of_a_worker_ends_the_old_one_at_once_and_for_good() -> None:
    """Loss is final per incarnation."""
    story = two_running()
    reborn = Incarnation(W0.id, 2)
    assert closed(story.join(reborn)) == [("a/0@1", CloseReason.WORKER_LOST)]
    (refused,) = story.join(W0, state=(running("a"),))
    assert refused == DropLink(W0, "attention-0#2 has joined since")


def test_a_worker_that_the_controller_has_lost_does_not_come_back() -> None:
    """It may have been cut off when it was to be killed. Its loss is final, though nobody took its place yet."""
    story = Story(W0, W1)
    story.tell(MembersExpected(frozenset({W1})))
    (refused,) = story.join(W0)
    assert refused == DropLink(W0, "the controller has lost it")
    story.submit("a")
    story.submit("b")
    assert story.started(story.round()) == {W1: ["a", "b"]}


def test_the_controllers_word_that_a_worker_is_gone_ends_the_wait() -> None:
    story = two_running()
    story.tell(WorkerLost(W0))
    assert closed(story.tell(MembersExpected(frozenset({W1})))) == [("a/0@1", CloseReason.WORKER_LOST)]


def test_a_worker_of_another_checkpoint_is_refused() -> None:
    story = Story()
    (refused,) = story.join(W1, fingerprint="model-b")
    assert isinstance(refused, DropLink)
    assert "model-b" in refused.reason


def test_a_refused_plan_ends_the_stream_and_joining_again_settles_it() -> None:
    """A plan that did not follow is answered with the worker's full state."""
    story = two_running()
    number = story.plans[W0].number
    said = {"plan_number": number - 1, "refused_orders": 1, "state": ()}
    assert story.report(W0, **said) == [DropLink(W0, f"plan {number} of {number} refused")]
    assert closed(story.join(W0, **said)) == [("a/0@1", CloseReason.WORKER_LOST)]


def test_a_state_said_in_between_does_not_judge_what_is_under_way() -> None:
    """Only what the worker had been told when it spoke."""
    story = two_running()
    assert story.report(W0, plan_number=1, state=()) == []
    assert closed(story.report(W0, plan_number=2, state=())) == [("a/0@1", CloseReason.WORKER_LOST)]


# --- a gateway's link ends -----------------------------------------------------------------------------


def test_a_lost_gateways_requests_are_cancelled_when_its_lease_ends() -> None:
    story = two_running()
    story.tell(GatewayLost(G))
    for _ in range(9):
        assert story.round(after_s=0.5) == []
    story.round(after_s=0.5)
    assert (story.plans[W0].stops, story.plans[W1].stops) == ((attempt("a"),), (attempt("b"),))


def test_a_gateway_that_returns_within_its_lease_keeps_its_requests() -> None:
    story = two_running()
    story.tell(GatewayLost(G))
    story.round(after_s=1.0)
    story.tell(GatewayJoined(G, "unix:g0"))
    assert closed(story.resume("a", attempt=1)) == []
    for _ in range(10):
        assert story.round(after_s=1.0) == []


def test_a_gateway_that_returns_after_its_lease_opens_new_attempts() -> None:
    """The old ones may still be running until their stops arrive: no number runs twice."""
    story = two_running()
    story.tell(GatewayLost(G))
    for _ in range(10):
        story.round(after_s=0.5)
    story.tell(GatewayJoined(G, "unix:g0"))
    assert closed(story.resume("a", attempt=1)) == [("a/0@1", CloseReason.WORKER_LOST)]
    assert closed(story.resume("a", attempt=2)) == []


def test_an_attempt_that_was_forgotten_while_it_stops_starts_again_only_after_its_end() -> None:
    """What is remembered of ended attempts is bounded; a worker never has one twice."""
    story = Story(W0, config=SchedulerConfig(ended_remembered_max=1, gateway_lease_s=0))
    story.submit("a")
    story.submit("b")
    story.round()
    story.tell(GatewayLost(G))
    story.round()
    story.tell(GatewayJoined(G, "unix:g0"))
    story.resume("a", attempt=1)
    assert story.started(story.round()) == {}
    story.report(W0, completions=((attempt("a"), FinishReason.CANCELLED, ""),))
    assert story.started(story.round()) == {W0: ["a"]}


def test_a_new_life_of_a_gateway_cancels_the_old_ones_requests_at_once() -> None:
    story = two_running()
    story.tell(GatewayJoined(Incarnation(G.id, 2), "unix:g0b"))
    story.round()
    assert story.plans[W0].stops == (attempt("a"),)
    (refused,) = story.tell(GatewayJoined(G, "unix:g0"))
    assert refused == DropLink(G, "gateway-0#2 has joined since")
    assert story.submit("c") == []
    assert story.scheduler.snapshot()["ignored_unknown_gateway_total"] == 1


def test_whom_the_controller_has_lost_is_lost_though_its_stream_has_not_noticed() -> None:
    """Its node is gone or cut off: nobody closes the stream, and its keep-alive takes far longer."""
    story = two_running()
    commands = story.tell(MembersExpected(frozenset({W1})))
    assert [c.to for c in commands if isinstance(c, DropLink)] == [W0]
    assert closed(commands) == [("a/0@1", CloseReason.WORKER_LOST)]

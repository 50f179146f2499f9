"""Stories of the scheduler: who is admitted, and what the others are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.scheduler.admission import Rate
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import Accept, RejectCode, WorkerLimits
from tests.unit.scheduler_story import LIMITS, W0, G, Story, attempt, siblings

SMALL_QUEUE = SchedulerConfig(queued_requests_max=2, queued_tokens_max=100)
NO_ROOM = replace(LIMITS, sequences_max=1)


def only(commands: list, kind: type) -> list:
    return [command for command in commands if isinstance(command, kind)]


def test_a_submission_for_another_checkpoint_is_refused() -> None:
    """A new checkpoint can stand beside the old."""
    (refused,) = Story(W0).submit("a", fingerprint="model-b")
    assert (refused.code, refused.retry_after_s) == (RejectCode.WRONG_MODEL, 0)
    assert "model-a" in refused.message
    assert "model-b" in refused.message


def test_without_a_worker_submissions_are_refused_but_resumes_wait() -> None:
    """503 when not ready; what was once accepted is never refused."""
    story = Story()
    (refused,) = story.submit("a")
    assert refused.code == RejectCode.NOT_READY
    assert story.resume("b", attempt=2) == [Accept(G, "b", 0)]
    story.join(W0)
    assert story.started(story.round()) == {W0: ["b"]}


@pytest.mark.parametrize(
    "limits", [replace(LIMITS, model_len_max=100), replace(LIMITS, blocks_total=6, block_tokens=16)]
)
def test_what_can_never_fit_is_refused_with_both_numbers(limits: WorkerLimits) -> None:
    """Neither the model's length nor any worker's whole pool can be exceeded."""
    most = limits.tokens_max
    story = Story(W0, limits=limits)
    (refused,) = story.submit("a", num_prompt=60, max_tokens=most - 59)
    assert (refused.code, refused.retry_after_s) == (RejectCode.TOO_LARGE, 0)
    assert "prompt of 60 tokens" in refused.message
    assert f"at most {most}" in refused.message
    assert only(story.submit("b", num_prompt=60, max_tokens=most - 60), Accept)


def test_a_full_queue_refuses_by_name_of_the_bound() -> None:
    """429 with what is waiting and which bound was hit, for requests and for tokens."""
    story = Story(W0, limits=NO_ROOM, config=SMALL_QUEUE)
    story.submit("runs")
    story.round()
    story.submit("a", num_prompt=40)
    (refused,) = story.submit("b", num_prompt=61)
    assert refused.code == RejectCode.OVERLOADED
    assert "queued_tokens_max is 100" in refused.message
    assert only(story.submit("c", num_prompt=60), Accept)
    (refused,) = story.submit("d", num_prompt=1)
    assert "queued_requests_max is 2" in refused.message
    assert story.scheduler.snapshot()["refused_overloaded_total"] == 2


def test_what_was_accepted_is_accepted_again_however_full_the_queue() -> None:
    """A gateway that did not hear the answer says it again."""
    story = Story(W0, limits=NO_ROOM, config=SMALL_QUEUE)
    for name in ("runs", "a", "b"):
        story.submit(name)
        story.round()
    for name in ("runs", "a", "b"):
        assert only(story.submit(name), Accept)
    assert story.scheduler.snapshot()["waiting"] == 2


def test_siblings_are_admitted_or_refused_together() -> None:
    """A request never runs in part."""
    story = Story(W0, limits=NO_ROOM, config=SMALL_QUEUE)
    story.submit("runs")
    story.round()
    story.submit("a", num_prompt=10)
    (refused,) = story.submit("b", num_prompt=31, siblings=siblings(3))
    assert refused.code == RejectCode.OVERLOADED
    assert story.scheduler.snapshot()["waiting"] == 1
    assert only(story.submit("c", num_prompt=30, siblings=siblings(3)), Accept)
    assert story.scheduler.snapshot()["waiting"] == 4


def test_a_request_larger_than_the_bound_enters_an_empty_queue() -> None:
    """Else it could never run, though it fits."""
    story = Story(W0, config=SMALL_QUEUE)
    assert only(story.submit("a", num_prompt=400), Accept)


def test_retry_after_follows_the_measured_rate_within_its_bounds() -> None:
    """The advice is honest: what waits now, at the rate of what ends."""
    config = SchedulerConfig(queued_requests_max=10, retry_after_s_min=2, retry_after_s_max=50)
    story = Story(W0, limits=NO_ROOM, config=config)
    for n in range(11):
        story.submit(f"r{n}")
        story.round()
    (refused,) = story.submit("x")
    assert refused.retry_after_s == 50  # nothing has ended yet: no rate is known
    for n in range(20):  # one each second
        story.now_s += 1.0
        story.complete(W0, attempt(f"r{n}"))
        story.round()
        story.submit(f"r{n + 11}")
    (refused,) = story.submit("y")
    assert refused.retry_after_s == pytest.approx(10, rel=0.1)
    for _ in range(200):
        story.now_s += 0.9
        story.round()
    (refused,) = story.submit("z")
    assert refused.retry_after_s == 50


def test_the_completion_rate_of_a_young_window_is_not_too_low() -> None:
    """10 a second are 10 a second after two seconds and after two minutes."""
    for duration_s in (2, 120):
        rate = Rate(window_s=30)
        for tick in range(duration_s * 10):
            rate.wait(0.1 if tick else 0.0)
            rate.add(1)
        assert rate.per_second() == pytest.approx(10, rel=0.06)


def test_nobody_is_told_to_come_back_later_than_the_bound() -> None:
    """Though nothing has ended yet, and prompts take long."""
    config = SchedulerConfig(queued_tokens_max=300, first_token_s=0, retry_after_s_max=5.0)
    story = Story(W0, limits=NO_ROOM, config=config)
    story.submit("runs")
    story.round()
    for _ in range(10):
        story.round(after_s=0.9)
    story.report(W0, prompts_done=[attempt("runs")])
    story.submit("waits", num_prompt=290)
    (refused,) = story.submit("late", num_prompt=20)
    assert "queued_tokens_max is 300" in refused.message
    assert refused.retry_after_s == 5.0

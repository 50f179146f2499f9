"""Promises of sharing: tenants in turn, priorities without starvation, honest refusals."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    Accept,
    AttemptId,
    CancelRequested,
    CloseReason,
    FinishReason,
    MembersExpected,
    Reject,
    RejectCode,
    Sibling,
)  # fmt: skip
from cluster.scheduler.shares import Shares
from cluster.scheduler.waiting import Waiting, WaitingQueue, due
from tests.unit.scheduler_peers import submission
from tests.unit.scheduler_story import LIMITS, W0, W1, G, Story, attempt, closed

ONE = replace(LIMITS, sequences_max=1)


def waiting(name: str, arrival: int, now_s: float = 0.0, **said: object) -> Waiting:
    asked = submission(name, **said)  # type: ignore[arg-type]
    entry = Waiting(G, asked, asked.siblings[0], arrival, now_s)
    entry.due_s = due(entry, 10.0, 300.0)
    return entry


def serve_next(queue: WaitingQueue, shares: Shares) -> Waiting:
    entry = next(iter(queue))
    shares.charge(entry.submission.tenant, entry.cost)
    queue.remove(entry.attempt)
    queue.check()
    return entry


@pytest.mark.parametrize("seed", range(40))
def test_between_tenants_that_keep_waiting_service_differs_by_two_sequences_at_most(seed: int) -> None:
    """However much one of them asks for, and whatever sizes they ask for."""
    rng = random.Random(seed)
    shares = Shares(100)
    queue = WaitingQueue(shares)
    tenants = ["a", "b", "c"]
    served: Counter[str] = Counter()
    count = 0

    def ask(tenant: str) -> None:
        nonlocal count
        count += 1
        sizes = {"num_prompt": rng.randint(1, 500), "max_tokens": rng.randint(1, 500)}
        queue.add(waiting(f"{tenant}{count}", count, tenant=tenant, priority=rng.randint(-9, 9), **sizes))

    for tenant in tenants:
        for _ in range(5 if tenant == "a" else 1):
            ask(tenant)
    for _ in range(400):
        entry = serve_next(queue, shares)
        served[entry.submission.tenant] += entry.cost
        ask(entry.submission.tenant)
        assert max(served.values()) - min(served[t] for t in tenants) <= 2 * 1000


@pytest.mark.parametrize("seed", range(40))
def test_nobody_overtakes_who_came_so_long_before(seed: int) -> None:
    """Priorities count as time, and no more of it than `overtake_s_max`."""
    rng = random.Random(seed)
    shares = Shares(100)
    queue = WaitingQueue(shares)
    came: dict[str, float] = {}
    for step in range(400):
        now_s = step * rng.choice([0.1, 1.0, 5.0])
        now_s = max(now_s, max(came.values(), default=0.0))
        came[str(step)] = now_s
        queue.add(waiting(str(step), step, now_s, priority=rng.choice([-(2**31), -3, 0, 0, 1, 2**31 - 1])))
        if rng.random() < 0.8:
            taken = serve_next(queue, shares).submission.request_id
            longest = min((came[e.submission.request_id] for e in queue), default=now_s)
            assert came[taken] - longest <= 300.0


@pytest.mark.parametrize("is_known", [False, True])
def test_who_was_away_has_saved_nothing_up(is_known: bool) -> None:
    """Nor has who was served before, and then went away."""
    shares = Shares(100)
    queue = WaitingQueue(shares)
    if is_known:
        queue.add(waiting("early", 99, tenant="late"))
        serve_next(queue, shares)
    for n in range(50):
        queue.add(waiting(f"busy{n}", n, tenant="busy"))
    for _ in range(20):
        serve_next(queue, shares)
    for n in range(50, 60):
        queue.add(waiting(f"late{n}", n, tenant="late"))
    order = [serve_next(queue, shares).submission.tenant for _ in range(10)]
    assert order.count("late") in (5, 6)


def test_what_an_answer_did_not_take_is_given_back() -> None:
    """A tenant that asks for long answers and gets short ones is served as much as another."""
    story = Story(W0, limits=ONE)
    story.submit("runs", tenant="x")
    story.round()
    for n in range(6):
        story.submit(f"long{n}", max_tokens=400, tenant="long")
        story.submit(f"short{n}", max_tokens=40, tenant="short")
    order, done = [], "runs"
    for _ in range(10):
        ended = (attempt(done), FinishReason.STOP, "", 40 if done != "runs" else 10)
        story.report(W0, completions=(ended,))
        (done,) = story.started(story.round())[W0]
        order.append(done[:-1])
    assert abs(order.count("long") - order.count("short")) <= 2


@pytest.mark.parametrize(
    ("said", "served"),
    [
        ({"completions": [(attempt("a"), FinishReason.STOP, "", 40)]}, 40),
        ({"completions": [(attempt("a"), FinishReason.FAILED, "", 7)]}, 7),
        ({"completions": [(attempt("a"), FinishReason.CANCELLED, "", 7)]}, 7),
        ({"undelivered": (attempt("a"),)}, 0),
        ({"state": ()}, 0),
    ],
)
def test_however_a_sequence_ends_its_tenant_has_paid_for_what_it_was_served(said: dict, served: int) -> None:
    """The prompt and what its worker says it generated; where it can say nothing, nothing."""
    story = Story(W0)
    story.submit("a", num_prompt=100, max_tokens=400, tenant="t")
    story.round()
    assert story.scheduler._books.shares.account("t") == 500
    story.report(W0, **said)
    assert story.scheduler._books.shares.account("t") == 100 + served


def test_what_is_stopped_or_computed_again_is_paid_once() -> None:
    story = Story(W0)
    shares = story.scheduler._books.shares
    story.submit("a", num_prompt=100, max_tokens=400, tenant="t")
    story.round()
    story.report(W0, completions=[(attempt("a"), FinishReason.CANCELLED, "", 30)])
    story.resume("a", attempt=2, num_accepted=30, num_prompt=100, max_tokens=400, tenant="t")
    story.round()
    assert shares.account("t") == 500
    story.tell(CancelRequested(G, "a"))
    story.round()
    story.report(W0, completions=[(attempt("a", 2), FinishReason.CANCELLED, "", 50)])
    assert shares.account("t") == 150


def test_a_worker_that_is_lost_takes_no_tenants_share_with_it() -> None:
    story = Story(W0)
    story.submit("a", num_prompt=100, max_tokens=400, tenant="t")
    story.round()
    story.tell(MembersExpected(frozenset()))
    assert story.scheduler._books.shares.account("t") == 100


def test_accounts_are_bounded() -> None:
    shares = Shares(10)
    for n in range(1000):
        shares.enter(str(n))
        shares.charge(str(n), n)
        shares.charge(f"goes on {n}", n)
        assert len(shares) <= 10


def test_who_was_served_most_gains_nothing_by_being_forgotten() -> None:
    shares = Shares(10)
    shares.charge("greedy", 1000)
    for n in range(100):
        shares.enter(str(n))
        shares.charge(str(n), 10)
    assert shares.account("greedy") == 1000


def test_a_tenants_flood_does_not_delay_another() -> None:
    story = Story(W0, limits=ONE)
    story.submit("runs", tenant="flood")
    story.round()
    for n in range(100):
        story.submit(f"f{n}", tenant="flood")
    assert story.submit("mine", tenant="me") == [Accept(G, "mine", queued_before=1)]
    story.complete(W0, attempt("runs"))
    first = story.started(story.round())[W0]
    story.complete(W0, attempt(first[0]))
    assert "mine" in first + story.started(story.round())[W0]


def test_who_would_wait_longer_than_promised_is_refused_at_once_with_the_time_to_come_back() -> None:
    """And only who would: another tenant's turn comes sooner."""
    story = Story(W0, limits=ONE, config=SchedulerConfig(first_token_s=5.0))
    story.submit("r0")
    story.round()
    for n in range(1, 21):  # one ends each second, one comes
        story.submit(f"r{n}")
        story.now_s += 1.0
        story.complete(W0, attempt(f"r{n - 1}"))
        story.round()
    answers = [story.submit(f"x{n}")[0] for n in range(30)]
    refused = [answer for answer in answers if isinstance(answer, Reject)]
    assert 22 <= len(refused) <= 26
    assert isinstance(answers[4], Accept)
    assert all(answer.code is RejectCode.OVERLOADED for answer in refused)
    assert "first_token_s is 5" in refused[0].message
    assert refused[0].retry_after_s <= 2.0
    assert isinstance(story.submit("y", tenant="another")[0], Accept)


def test_a_paused_sequence_moves_to_a_worker_with_room_for_all_of_it() -> None:
    """It goes on there exactly, as the next attempt."""
    story = Story(W0)
    story.submit("a", num_prompt=100, max_tokens=200)
    story.round()
    assert closed(story.report(W0, num_paused=1, paused=(attempt("a"),))) == []  # nowhere to go: it stays
    story.join(W1)
    story.round()
    story.report(W1, state=())
    moved = story.report(W0, num_paused=1, paused=(attempt("a"),))
    assert closed(moved) == [("a/0@1", CloseReason.PREEMPTED)]
    story.submit("a", num_prompt=100, max_tokens=200, siblings=(Sibling(0, 2, 7, (1, 2)),), resume=True)
    assert story.started(story.round()) == {W1: ["a"]}
    assert story.plans[W0].stops == (attempt("a"),)
    assert story.plans[W1].starts[0].accepted == (1, 2)


def test_a_sequence_is_moved_for_a_dry_worker_a_bounded_number_of_times() -> None:
    """Each time is an attempt, and gateways open so many of them and no more."""
    story = Story(W0, W1)
    story.submit("a", num_prompt=100, max_tokens=200)
    (at,) = story.started(story.round())
    number = 1
    while closed(story.report(at, num_paused=1, paused=(attempt("a", number),))):
        story.complete(at, attempt("a", number))
        number += 1
        assert number <= 3
        story.resume("a", attempt=number, num_accepted=2, num_prompt=100, max_tokens=200)
        (at,) = story.started(story.round())
    assert number == 3


def test_a_sequence_is_not_moved_where_it_would_run_dry_again() -> None:
    story = Story(W0, W1)
    story.free[W1] = 10
    story.report(W1)
    story.submit("a", num_prompt=100, max_tokens=200)
    assert story.started(story.round()) == {W0: ["a"]}
    assert closed(story.report(W0, num_paused=1, paused=(attempt("a"),))) == []


def test_a_new_term_goes_on_counting_arrivals_where_the_old_one_was() -> None:
    """Newcomers never outrank what runs when the pool is dry."""
    before = Story(W0, term=1)
    before.submit("old")
    before.round()
    (old,) = before.plans[W0].starts
    after = Story(W0, term=2)
    after.submit("new")
    after.round()
    (new,) = after.plans[W0].starts
    assert new.arrival > old.arrival
    assert new.attempt == AttemptId("new", 0, 1)

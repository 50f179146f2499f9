"""The simulator finds bugs: each is planted into a real decider, and some seed's story must break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attention_workers.book import Book
from attention_workers.kv_blocks import KvBlocks
from attention_workers.step import Plan, StepResult
from cluster.epochs import Epochs
from cluster.scheduler.books import Books
from cluster.scheduler.recovery import Recovery
from cluster.sim.run import run
from cluster.sim.scenario import Fault, Load, Scenario, Shape, drawn
from gateway.ledger import Ledger
from router.dispatcher import Dispatcher
from router.placement import EpochId
from router.transport.base import Refusal, RefusalReason

SEEDS_MAX = 40


def first_broken(scenario: Callable[[int], Scenario] = drawn) -> str:
    """How the story of the first seed breaks that does."""
    for seed in range(SEEDS_MAX):
        broken = run(scenario(seed)).broken
        if broken:
            return broken
    pytest.fail(f"{SEEDS_MAX} seeds did not find it")


def two_schedulers(seed: int) -> Scenario:
    """One after another is started beside the last, and a slow worker reads what both say."""
    usurped = tuple(Fault(at_s, "usurp", "scheduler") for at_s in (2.0, 3.5, 5.0, 6.5))
    slow = Fault(1.9, "slow", "attention-0", 4.0, 7.0)
    return Scenario(seed, Shape(attention=1, experts=2), Load(count=24), (slow, *usurped))


def experts_lost(seed: int) -> Scenario:
    """One after another, where sums come back."""
    killed = tuple(Fault(2.0 + at_s, "kill", f"expert-{at_s % 3}") for at_s in range(5))
    return Scenario(seed, Shape(experts=3, replicas=2, sums=1), Load(count=24), killed)


def test_a_lost_retry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway opens the next attempt, and tells nobody."""

    def reopen(self: Ledger, sequence: Any, reason: str) -> None:
        sequence.attempt += 1

    monkeypatch.setattr(Ledger, "_reopen", reopen)
    broken = first_broken()
    assert "requests have not ended" in broken


def test_an_attempt_that_is_not_closed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler forgets what its worker lost, and tells no gateway."""

    def close(self: Books, attempt: Any, reason: Any, detail: str) -> Any:
        self.end(attempt)
        yield from ()

    monkeypatch.setattr(Books, "close", close)
    assert "requests have not ended" in first_broken()


def test_a_double_merge_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one reply of a ticket fails all its rows are planned again, those that were merged too."""
    gather = Dispatcher._gather

    def gather_all(self: Dispatcher, pending: Any, into: Any) -> Any:
        failed = yield from gather(self, pending, into)
        if failed:
            refusal = Refusal(RefusalReason.PEER_LOST)
            parcels = zip(pending.ticket.parcels, pending.plan.parcels, strict=True)
            failed = [(parcel, planned.positions, refusal) for parcel, planned in parcels]
        return failed

    monkeypatch.setattr(Dispatcher, "_gather", gather_all)
    assert "must be" in first_broken(experts_lost)


def test_a_block_freed_while_in_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the books' own check, and without it by the tokens of whoever shares the block."""

    def give_back(self: KvBlocks, blocks: list[int], *, is_passed: bool = False) -> None:
        for block in reversed(blocks):
            self._held[block] -= 1
            if block in self._name_of:
                self.disown([self._name_of[block]])
            if not self._held[block]:
                del self._held[block]
            self._free.insert(0, block)  # whoever else holds it

    monkeypatch.setattr(KvBlocks, "give_back", give_back)
    first_broken()
    monkeypatch.setattr(Book, "check", lambda self: None)
    broken = first_broken()
    assert "must be" in broken


def test_a_stale_term_obeyed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker takes plans of whoever was its scheduler once. Another guard voids them before: it is gone too."""
    monkeypatch.setattr("cluster.sim.attention.still_said", lambda items: items)
    refuse = Book._refuse_unless_next

    def refuse_unless_older(self: Book, plan: Plan, result: StepResult) -> None:
        if plan.term >= self.term:
            refuse(self, plan, result)

    monkeypatch.setattr(Book, "_refuse_unless_next", refuse_unless_older)
    assert "stale" in first_broken(two_schedulers)


def test_an_epoch_retired_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the next is published, whoever still uses it."""

    def retire(self: Epochs, adopted: list[EpochId | None]) -> EpochId | None:
        published = self.published
        if published is None or (self.retired and self.retired.number >= published.epoch.number - 1):
            return None
        self.retired = EpochId(published.epoch.term, published.epoch.number - 1)
        return self.retired

    monkeypatch.setattr(Epochs, "retire", retire)
    broken = first_broken()
    assert "is retired while" in broken


def test_a_placement_made_blindly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new scheduler does not wait for what workers say they run."""
    monkeypatch.setattr(Recovery, "is_blind", lambda self, heard: False)
    monkeypatch.setattr(Recovery, "judge", lambda self, heard, now_s: setattr(self, "over", True))
    broken = first_broken()
    assert "both run" in broken

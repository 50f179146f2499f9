"""Promises of what an exchange waits in: it may stay awake for a moment, and for no more than that."""

import os
from collections.abc import Iterator

import pytest

from router.transport.watch import READABLE, RUNG, Watch

MOMENT_S = 1e-3
WAITS = 2000


class Clock:
    """Stands in for `os` and `time` as the watch sees them: time passes only while it stays awake."""

    def __init__(self, on_yield: list[int]) -> None:
        self.now_s, self.yields = 0.0, 0
        self._bells = on_yield  # eventfds to ring, one at each yield

    def monotonic(self) -> float:
        return self.now_s

    def sched_yield(self) -> None:
        self.now_s += MOMENT_S / 10
        self.yields += 1
        if self._bells:
            os.eventfd_write(self._bells.pop(), 1)


@pytest.fixture
def bell() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def watched(monkeypatch: pytest.MonkeyPatch, bell: int, moment_s: float, rings: int = 0) -> tuple[Watch, Clock]:
    clock = Clock([bell] * rings)
    monkeypatch.setattr("router.transport.watch.time", clock)
    monkeypatch.setattr("router.transport.watch.os", clock)
    watch = Watch(moment_s)
    watch.add(bell, RUNG)
    return watch, clock


def test_what_rings_within_the_moment_finds_it_awake(monkeypatch: pytest.MonkeyPatch, bell: int) -> None:
    watch, clock = watched(monkeypatch, bell, MOMENT_S, rings=WAITS)
    assert all(watch.wait(MOMENT_S) for _ in range(WAITS))
    assert clock.yields == WAITS
    watch.close()


def test_moments_that_pass_in_vain_are_tried_ever_more_seldom(monkeypatch: pytest.MonkeyPatch, bell: int) -> None:
    watch, clock = watched(monkeypatch, bell, MOMENT_S)
    tried = []
    for _ in range(WAITS):
        before_s = clock.now_s
        assert not watch.wait(1e-9 if tried else MOMENT_S)
        tried.append(clock.now_s > before_s)
        clock.now_s = max(clock.now_s, before_s)
    assert sum(tried) <= 7 + WAITS / 64
    assert sum(tried[-130:]) >= 2, "it never gives up for good"
    watch.close()


def test_it_is_awake_for_no_longer_than_the_moment_or_the_wait(monkeypatch: pytest.MonkeyPatch, bell: int) -> None:
    for wait_s, longest_s in ((0.01, MOMENT_S), (MOMENT_S / 2, MOMENT_S / 2), (0.0, 0.0)):
        watch, clock = watched(monkeypatch, bell, MOMENT_S)
        assert not watch.wait(wait_s)
        assert clock.now_s <= longest_s + MOMENT_S / 10
        watch.close()


def test_without_a_moment_it_sleeps_at_once(monkeypatch: pytest.MonkeyPatch, bell: int) -> None:
    watch, clock = watched(monkeypatch, bell, 0.0)
    assert not watch.wait(1e-3)
    assert clock.yields == 0
    watch.close()


def test_an_event_of_who_was_removed_is_nobody_elses(bell: int) -> None:
    """A descriptor closed by one handler may be given at once to a stranger let in by the next: what happened to
    the old one is no word of the new."""
    watch, removed, told = Watch(), os.eventfd(1, os.EFD_NONBLOCK), list[str]()

    def replace() -> None:
        nonlocal removed
        os.eventfd_read(bell)
        watch.remove(removed)
        os.close(removed)
        old, removed = removed, os.eventfd(0, os.EFD_NONBLOCK)
        assert removed == old, "the kernel gives the lowest number that is free"
        watch.add(removed, READABLE, lambda: told.append("stranger"))

    os.eventfd_write(bell, 1)
    watch.add(bell, READABLE, replace)
    watch.add(removed, READABLE, lambda: told.append("removed"))
    assert watch.wait(0.0)
    assert told == []
    os.eventfd_write(removed, 1)
    assert watch.wait(0.0)
    assert told == ["stranger"]
    watch.close()
    os.close(removed)

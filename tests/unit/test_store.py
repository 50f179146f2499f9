"""Counters: each number once, whoever draws; the highest is known to all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cluster.store import MemoryStore, draw


def test_numbers_begin_at_one_and_follow_without_gaps() -> None:
    store = MemoryStore()
    assert [draw(store, "controller") for _ in range(3)] == [1, 2, 3]
    assert store.last("controller") == 3


def test_counters_do_not_know_one_another() -> None:
    store = MemoryStore()
    draw(store, "expert-0")
    assert (store.last("expert-1"), draw(store, "expert-1")) == (0, 1)


def test_a_number_is_claimed_once() -> None:
    """Two controllers that order the same life of a worker: the second is refused."""
    store = MemoryStore()
    assert store.claim("expert-0", 7)
    assert not store.claim("expert-0", 7)
    assert draw(store, "expert-0") == 8


def test_every_counter_is_known_by_its_last_number() -> None:
    store = MemoryStore()
    for name in ("expert-0", "expert-0", "controller"):
        draw(store, name)
    assert store.lasts() == {"expert-0": 2, "controller": 1}


def test_a_record_is_its_highest_version_in_whatever_order_they_are_written() -> None:
    """A controller that was frozen writes late: its term is older."""
    store = MemoryStore()
    assert store.read("pools") is None
    store.write("pools", 7, "new")
    store.write("pools", 3, "old")
    assert store.read("pools") == "new"


def test_numbers_drawn_at_the_same_time_differ() -> None:
    store = MemoryStore()
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda _: draw(store, "gateway-0"), range(200)))
    assert sorted(drawn) == list(range(1, 201))

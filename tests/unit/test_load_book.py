"""What experts were asked for lately: counted once, whoever restarts, and older load counts less."""

from __future__ import annotations

import pytest

from cluster.balancer.load_book import LoadBook
from router.membership import ExpertLoad
from router.placement import Member

ONE, TWO = Member("expert-0", 1), Member("expert-1", 1)


def book() -> LoadBook:
    """Two layers of three experts; ten seconds halve, four rows are as much as a read."""
    made = LoadBook(2, 3, half_life_s=10, rows_per_read=4)
    made.hear(ONE, ExpertLoad(), 0.0)
    made.hear(TWO, ExpertLoad(), 0.0)
    return made


def counted(*entries: tuple[int, int, int]) -> ExpertLoad:
    slots, reads, rows = zip(*entries, strict=True)
    return ExpertLoad(slots, reads, rows)


def test_load_is_reads_and_what_their_rows_weigh() -> None:
    loads = book()
    loads.hear(ONE, counted((1, 3, 8), (5, 1, 1)), 0.0)
    assert loads.load.tolist() == [[0, 5, 0], [0, 0, 1.25]]


def test_only_what_came_since_the_last_report_is_added_and_older_load_halves() -> None:
    loads = book()
    loads.hear(ONE, counted((0, 8, 0)), 0.0)
    loads.hear(TWO, counted((0, 1, 0)), 10.0)
    loads.hear(ONE, counted((0, 8, 0)), 10.0)
    assert loads.load[0, 0] == 5


def test_a_new_life_counts_from_nothing_and_what_an_old_one_counted_before_us_is_not_ours() -> None:
    loads = book()
    loads.hear(ONE, counted((0, 5, 0)), 0.0)
    loads.hear(Member("expert-0", 2), counted((0, 1, 0)), 0.0)
    loads.hear(Member("expert-0", 2), counted((0, 3, 0)), 0.0)
    loads.hear(Member("expert-7", 1), counted((0, 1000, 0)), 0.0)  # a controller that has just been restarted
    assert loads.load[0, 0] == 7


def test_imbalance_is_of_the_busiest_worker_of_each_layer() -> None:
    """Layers run one after the other: workers that are busy in turn do not make up for one another."""
    loads = book()
    assert loads.imbalance(("expert-0", "expert-1")) is None
    loads.hear(ONE, counted((0, 3, 0), (3, 1, 0)), 0.0)
    loads.hear(TWO, counted((1, 1, 0), (4, 3, 0)), 0.0)
    assert loads.levels == {"expert-0": 4, "expert-1": 4}
    assert loads.imbalance(("expert-0", "expert-1")) == pytest.approx(1.5)
    assert loads.imbalance(("expert-0", "expert-1", "expert-2")) == pytest.approx(2.25)


def test_a_new_placement_is_judged_by_what_comes_after_it() -> None:
    loads = book()
    loads.hear(ONE, counted((0, 3, 0)), 0.0)
    loads.forget({"expert-0", "expert-1"})
    assert loads.imbalance(("expert-0", "expert-1")) is None
    assert loads.load[0, 0] == 3
    loads.hear(ONE, counted((0, 4, 0)), 0.0)
    loads.hear(TWO, counted((0, 1, 0)), 0.0)
    assert loads.imbalance(("expert-0", "expert-1")) == 1

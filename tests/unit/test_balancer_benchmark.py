"""What the balancer's benchmark compares: the published greedy on the same loads, planned by the real router."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.balancer import Case, compare, drawn, eplb


def test_the_published_greedy_replicates_the_hottest_and_packs_by_load() -> None:
    """Three workers with two slots: the hottest expert twice, each replica where least is."""
    assert eplb(np.array([9.0, 6, 4, 3, 2]), workers=3, slots=2) == [[1, 4], [0, 2], [0, 3]]


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_no_worse_balance_than_the_published_greedy_with_fewer_moves(exponent: float) -> None:
    """As the real router divides microbatches that neither has seen; and asked again, nothing moves."""
    ids = drawn(exponent, layers=3, experts=64, top=8, tokens=32, batches=40, seed=1)
    dealt, greedy, ours, again = compare(Case("small", 4, 4, ids, 64))
    assert ours.moves < greedy.moves / 2
    assert ours.step <= greedy.step + 0.03
    assert max(ours.modelled, ours.reads) <= 1.10 < dealt.step + 0.05
    assert again.moves == 0

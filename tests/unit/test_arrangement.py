"""Experts arranged with few moves: complete, even, replicas apart, and nothing moves without a reason."""

from __future__ import annotations

import random

import pytest

from cluster.arrangement import arrange, num_moves
from router.placement import EpochId, Member, PlacedWorker, Placement, spread


def members(*ids: str, life: int = 1) -> list[tuple[Member, str]]:
    return [(Member(f"expert-{i}", life), f"@{i}") for i in ids]


def asked(number: int, here: list[tuple[Member, str]], layers: int, experts: int) -> Placement:
    workers = tuple(PlacedWorker(member, address, ()) for member, address in here)
    return Placement(EpochId(1, number), "f00d", layers, experts, workers)


def check(placement: Placement, replicas: int) -> None:
    """Valid (which keeps replicas apart), every expert as often as wanted, shares even to within one."""
    placement.validate()
    holders = (placement.holder_table >= 0).sum(axis=2)
    assert (holders == replicas).all()
    totals = [len(w.experts) for w in placement.workers]
    assert max(totals) - min(totals) <= 1
    for layer in range(placement.num_layers):
        shares = [sum(at == layer for at, _ in w.experts) for w in placement.workers]
        assert max(shares) - min(shares) <= 1


def test_without_a_past_experts_are_dealt_like_cards() -> None:
    here = members("0", "1", "2")
    dealt = spread(EpochId(1, 1), "f00d", here, 3, 7, 2)
    assert arrange(None, asked(1, here, 3, 7), 2) == dealt


def test_arranged_again_nothing_moves() -> None:
    here = members("0", "1", "2")
    before = spread(EpochId(1, 1), "f00d", here, 3, 7, 2)
    assert arrange(before, asked(2, here, 3, 7), 2).workers == before.workers


def test_the_next_life_of_a_worker_takes_its_predecessors_slots() -> None:
    before = spread(EpochId(1, 1), "f00d", members("0", "1", "2"), 3, 7, 2)
    here = [*members("0", "2"), *members("1", life=2)]
    after = arrange(before, asked(2, sorted(here), 3, 7), 2)
    assert [w.experts for w in after.workers] == [w.experts for w in before.workers]


def test_a_newcomer_takes_its_share_and_nothing_else_moves() -> None:
    """From 2 to 3 workers of 6 experts in 2 layers, one copy of each: a third of all experts moves."""
    before = spread(EpochId(1, 1), "f00d", members("0", "1"), 2, 6, 1)
    after = arrange(before, asked(2, members("0", "1", "2"), 2, 6), 1)
    check(after, 1)
    assert num_moves(before, after) == 4 == len(after.workers[2].experts)


def test_a_leavers_experts_go_to_the_others_and_nothing_else_moves() -> None:
    before = spread(EpochId(1, 1), "f00d", members("0", "1", "2"), 2, 6, 1)
    after = arrange(before, asked(2, members("0", "2"), 2, 6), 1)
    check(after, 1)
    assert num_moves(before, after) == len(before.workers[1].experts)


@pytest.mark.parametrize("seed", range(60))
def test_any_history_of_pools_stays_even_and_complete(seed: int) -> None:
    """Random workers come and go, replicas differ; and no step moves more than a new deal would."""
    rng = random.Random(seed)
    layers, experts = rng.randint(1, 4), rng.randint(1, 12)
    before = None
    for number in range(1, 8):
        here = members(*map(str, sorted(rng.sample(range(8), rng.randint(1, 6)))), life=1)
        replicas = rng.randint(1, min(3, len(here)))
        after = arrange(before, asked(number, here, layers, experts), replicas)
        check(after, replicas)
        if before is not None:
            dealt = spread(EpochId(1, number), "f00d", here, layers, experts, replicas)
            assert num_moves(before, after) <= num_moves(before, dealt)
        before = after

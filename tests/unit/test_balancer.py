"""The balancer places what must be, then balances by few moves, and does not swing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.balancer.layer import Layer, divide
from cluster.balancer.place import Policy, place
from cluster.balancer.table import Room, Table, even_slots
from router.errors import PlacementError
from router.placement import EpochId, Member, Placement

EPOCH = EpochId(1, 1)


def pool(workers: int, slots: int, hosts: int = 1) -> list[Room]:
    return [Room(Member(f"expert-{i}", 1), f"@{i}", f"host-{i % hosts}", slots) for i in range(workers)]


def placed(rooms, load, current=None, policy=Policy(), together=None) -> Placement:
    return place(EPOCH, "f", rooms, np.asarray(load, dtype=float), current, policy, together)


def zipf(layers: int, experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(1000 / np.arange(1, experts + 1) ** exponent) for _ in range(layers)])


def imbalance(rooms, load, placement: Placement) -> float:
    table = Table(rooms, np.asarray(load, dtype=float), 1, placement, None)
    return table.busiest / table.mean


def loaded(before: Placement, after: Placement) -> int:
    """Experts that some worker must load."""
    held = {worker.member: set(worker.experts) for worker in before.workers}
    return sum(len(set(worker.experts) - held.get(worker.member, set())) for worker in after.workers)


def hosts_of(rooms, placement: Placement, layer: int, expert: int) -> list[str]:
    holds = {worker.member for worker in placement.workers if (layer, expert) in worker.experts}
    return [room.host for room in rooms if room.member in holds]


# What must be.


@st.composite
def pools(draw, layers: int, experts: int) -> tuple[list[Room], np.ndarray, Policy]:
    workers, replicas = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    slots = even_slots(layers, experts, draw(st.integers(1, replicas)), workers)
    hosts = draw(st.integers(1, 3))
    rooms = [
        Room(Member(f"e{i}", draw(st.integers(1, 2))), "@", f"h{i % hosts}", slots + draw(st.integers(0, 4)))
        for i in range(workers)
    ]
    load = draw(st.lists(st.integers(0, 50), min_size=layers * experts, max_size=layers * experts))
    policy = Policy(replicas, draw(st.sampled_from([None, 0, 1, 4])))
    return rooms, np.array(load, dtype=float).reshape(layers, experts), policy


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data(), st.integers(1, 3), st.integers(1, 7))
def test_whatever_there_was_the_result_is_valid_within_slots_and_budget_and_stays(data, layers, experts):
    """Workers come and go with any slots; what they held before may be too much for them, or nothing."""
    was_rooms, was_load, was_policy = data.draw(pools(layers, experts))
    rooms, load, policy = data.draw(pools(layers, experts))
    current = placed(was_rooms, was_load, policy=was_policy)
    covered = placed(rooms, load, current, Policy(policy.replicas, 0))
    result = placed(rooms, load, current, policy)
    for placement in (covered, result):
        placement.validate()
        assert all(
            len(worker.experts) <= room.slots for worker, room in zip(placement.workers, rooms, strict=True)
        )
    assert imbalance(rooms, load + 0.01, result) <= imbalance(rooms, load + 0.01, covered) + 0.05
    if policy.moves_max is None:
        for _ in range(3):  # copies may make room for better ones, for a while
            result = placed(rooms, load, result, policy)
        assert placed(rooms, load, result, policy).workers == result.workers
    else:
        assert loaded(current, result) <= loaded(current, covered) + policy.moves_max


@pytest.mark.parametrize("load", [np.zeros((3, 8)), zipf(3, 8, 1.0)])
def test_every_expert_is_on_two_hosts_where_slots_allow(load):
    rooms = pool(4, even_slots(3, 8, 2, 4), hosts=2)
    placement = placed(rooms, load, policy=Policy(replicas=2))
    for layer in range(3):
        for expert in range(8):
            assert set(hosts_of(rooms, placement, layer, expert)) == {"host-0", "host-1"}


def test_every_expert_is_held_once_before_any_is_held_twice():
    """Slots for one and a half replicas: nothing is missing, and half has a second holder."""
    rooms = pool(3, 4)
    placement = placed(rooms, np.zeros((1, 8)), policy=Policy(replicas=2))
    counts = (placement.holder_table >= 0).sum(axis=2)
    assert counts.min() == 1
    assert counts.sum() == 12


def test_a_worker_that_joins_takes_its_share_and_one_that_leaves_is_covered_by_the_rest():
    load = zipf(4, 12, 0.5)
    three, four = pool(3, even_slots(4, 12, 1, 3)), pool(4, even_slots(4, 12, 1, 4))
    first = placed(three, load)
    joined = placed(four, load, first)
    assert {len(worker.experts) for worker in joined.workers} == {12}
    assert loaded(first, joined) <= 12 + 8  # its share, and a few exchanges
    left = placed(three, load, joined)
    left.validate()
    assert loaded(joined, left) <= 12 + 8


def test_a_newcomer_gets_a_share_though_the_others_have_room_for_everything():
    """Spare slots are for copies, and no reason to leave somebody idle."""
    before = placed(pool(3, even_slots(4, 12, 2, 3, spare=8)), np.zeros((4, 12)), policy=Policy(2, 0))
    rooms = pool(4, even_slots(4, 12, 2, 4, spare=8))
    joined = placed(rooms, np.zeros((4, 12)), before, Policy(2, 0))
    assert loaded(before, joined) == len(joined.workers[3].experts) == 4 * 12 * 2 // 4
    assert imbalance(rooms, np.ones((4, 12)), joined) < 1.1


def test_what_must_be_loaded_goes_where_it_balances_best():
    """One of four dies, and is not replaced: its experts even out what the others do, for no load more."""
    load = zipf(3, 16, 1.0)
    four, three = pool(4, 24), pool(3, 36)
    before = placed(four, load, policy=Policy(2))
    after = placed(three, load, before, Policy(2, 0))
    assert loaded(before, after) == 96 - sum(len(worker.experts) for worker in before.workers[:3])
    assert imbalance(three, load, after) < 1.05


def test_a_replacement_takes_what_its_predecessor_held_and_nobody_else_moves():
    rooms = pool(3, even_slots(4, 12, 1, 3))
    first = placed(rooms, np.ones((4, 12)))
    replaced = [*rooms[:2], Room(Member("expert-2", 2), "@new", "host-0", rooms[2].slots)]
    second = placed(replaced, np.ones((4, 12)), first)
    assert [set(worker.experts) for worker in second.workers] == [set(worker.experts) for worker in first.workers]


def test_too_few_slots_are_refused_by_number():
    with pytest.raises(PlacementError, match=r"slots: 6 on 2 expert worker\(s\); accepted: at least 8"):
        placed(pool(2, 3), np.ones((1, 8)))


# Balance.


def all_placements(experts: int, workers: int, slots: int) -> Iterator[np.ndarray]:
    """Every [E, W] that holds each expert and keeps to the slots."""
    choices = np.array([[mask >> w & 1 for w in range(workers)] for mask in range(1, 2**workers)], dtype=bool)
    held = np.zeros((experts, workers), dtype=bool)

    def choose(expert: int) -> Iterator[np.ndarray]:
        if expert == experts:
            yield held
            return
        for choice in choices:
            held[expert] = choice
            if (held[: expert + 1].sum(axis=0) <= slots).all():
                yield from choose(expert + 1)

    return choose(0)


@pytest.mark.parametrize("seed", range(8))
def test_small_cases_are_optimal(seed):
    """Against every placement that there is."""
    rng = np.random.default_rng(seed)
    workers, spare = 2 + seed % 2, seed % 3
    experts = 5 if workers == 2 or not spare else 4
    slots = -(-experts // workers) + spare
    load = rng.integers(1, 20, experts).astype(float)
    rooms = pool(workers, slots)
    unknown = placed(rooms, np.zeros((1, experts)))
    found = placed(rooms, load[None], unknown, Policy(slack=0, gain_min=0))
    best = min(divide(load, held).sum(axis=0).max() for held in all_placements(experts, workers, slots))
    assert imbalance(rooms, load[None], found) * load.sum() / workers == pytest.approx(best)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_skewed_load_is_within_a_tenth_of_the_mean_when_slots_allow(exponent):
    load = zipf(3, 32, exponent)
    rooms = pool(4, even_slots(3, 32, 1, 4, spare=4))
    before = placed(rooms, np.zeros((3, 32)))
    assert imbalance(rooms, load, before) > 1.15
    assert imbalance(rooms, load, placed(rooms, load, before)) <= 1.10


def test_rearranging_comes_before_replicating():
    """Where a move balances the pool, a small budget goes to it, and not to a copy."""
    load = np.array([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    rooms = pool(2, 6)
    current = placed(rooms, np.zeros((1, 8)))
    result = placed(rooms, load, current, Policy(moves_max=1))
    assert imbalance(rooms, load, result) <= 1.05 < imbalance(rooms, load, current)
    assert sum(len(worker.experts) for worker in result.workers) == 8


def test_a_hot_expert_is_replicated_where_no_exchange_can_help():
    load = np.array([[70.0, 10, 10, 10]])
    rooms = pool(2, 3)
    result = placed(rooms, load)
    assert len(hosts_of(rooms, result, 0, 0)) == 2
    assert imbalance(rooms, load, result) <= 1.05


def test_a_small_budget_is_spent_where_most_time_is_lost():
    load = np.concatenate([zipf(1, 12, 0.3), 50 * zipf(1, 12, 1.0)])
    rooms = pool(3, even_slots(2, 12, 1, 3, spare=2))
    current = placed(rooms, np.zeros((2, 12)))
    result = placed(rooms, load, current, Policy(moves_max=2))
    assert 0 < loaded(current, result) <= 2
    before, after = (Table(rooms, load, 1, p, None).layers for p in (current, result))
    assert after[0].busiest == before[0].busiest
    assert after[1].busiest < before[1].busiest


def test_load_that_wavers_moves_nothing():
    """A few per cent up and down, for ever: no new placement after the first."""
    rng = np.random.default_rng(3)
    load = zipf(4, 16, 1.0)
    rooms = pool(4, even_slots(4, 16, 1, 4, spare=2))
    current = placed(rooms, load)
    for _ in range(20):
        wavering = load * rng.uniform(0.97, 1.03, load.shape)
        assert placed(rooms, wavering, current).workers == current.workers


def test_coactivated_experts_are_put_apart():
    """Experts 2i and 2i + 1 are always asked for together; all are as busy."""
    together = np.zeros((1, 8, 8))
    for i in range(0, 8, 2):
        together[0, i, i + 1] = together[0, i + 1, i] = 10
    placement = placed(pool(2, 4), np.ones((1, 8)), together=together)
    for worker in placement.workers:
        pairs = {expert // 2 for _, expert in worker.experts}
        assert len(pairs) == 4


def test_replicas_of_one_worker_are_spread_over_all_others():
    """So that the load of one that is lost is, too."""
    rooms = pool(5, even_slots(1, 20, 2, 5))
    placement = placed(rooms, np.ones((1, 20)), policy=Policy(replicas=2))
    held = (placement.holder_table[0][:, :, None] == np.arange(5)).any(axis=1)  # [E, W]
    common = held.T.astype(int) @ held
    assert common[~np.eye(5, dtype=bool)].min() >= 1


def test_division_pours_into_the_lowest_levels():
    held = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=bool)
    layer = Layer(np.array([4.0, 1, 4, 3]), held, held.copy(), np.zeros(3, dtype=int), 1)
    assert layer.amounts[2].tolist() == [0, 1.5, 2.5]
    assert layer.amounts[3].tolist() == [0, 1.5, 1.5]
    assert layer.levels.tolist() == [4, 4, 4]

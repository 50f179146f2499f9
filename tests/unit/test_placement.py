"""A placement is checked before it is believed, and says what changes from one to the next."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from expertmesh.v1 import control_pb2
from hypothesis import given
from hypothesis import strategies as st

from router.errors import PlacementError
from router.placement import EpochId, Member, PlacedWorker, Placement, spread
from router.wire import placement_from_pb, placement_to_pb
from tests.unit.placement_table import holders


def workers(count: int) -> list[tuple[Member, str]]:
    return [(Member(f"expert-{number}", 1), f"address-{number}") for number in range(count)]


def placement(*hands: list[tuple[int, int]], num_layers: int = 1, num_experts: int = 3) -> Placement:
    placed = tuple(
        PlacedWorker(member, address, tuple(hand))
        for (member, address), hand in zip(workers(len(hands)), hands, strict=True)
    )
    return Placement(EpochId(1, 1), "abc", num_layers, num_experts, placed)


ALL = [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("hands", "complaint"),
    [
        ([[(0, 0), (0, 1)], [(0, 1)]], r"1 \(layer, expert\) held by no worker, the first: \(0, 2\)"),
        ([[*ALL, (0, 3)]], r"'expert-0': holds \(layer 0, expert 3\).*0 to 2"),
        ([[*ALL, (1, 0)]], r"'expert-0': holds \(layer 1, expert 0\).*0 to 0"),
        ([[*ALL, (0, -1)]], r"expert -1"),
        ([ALL, [(0, 1), (0, 1)]], r"'expert-1': holds \(layer 0, expert 1\) twice"),
    ],
)
def test_what_contradicts_is_named(hands: list[list[tuple[int, int]]], complaint: str) -> None:
    """Who reads the log must see which worker and which expert."""
    with pytest.raises(PlacementError, match=complaint):
        placement(*hands).validate()


def test_a_worker_has_one_life_in_one_placement() -> None:
    """Two incarnations of one id cannot both be alive."""
    table = placement(ALL, ALL)
    twice = replace(table.workers[0], member=Member("expert-1", 2))
    with pytest.raises(PlacementError, match="'expert-1' appears twice"):
        replace(table, workers=(*table.workers, twice)).validate()


def test_a_partial_placement_may_miss_experts() -> None:
    """While a lost worker's experts are loaded elsewhere, the rest goes on."""
    table = placement([(0, 0)], [])
    table.validate(partial=True)
    assert [holders(table, 0, expert) for expert in range(3)] == [(0,), (), ()]
    placement().validate(partial=True)


def test_holders_are_ascending_and_per_layer() -> None:
    """The deterministic choice of a replica rests on their order."""
    table = placement([(1, 0)], [(0, 0), (1, 0)], [(0, 0)], num_layers=2, num_experts=1)
    assert holders(table, 0, 0) == (1, 2)
    assert holders(table, 1, 0) == (0, 1)


def test_an_expert_is_covered_while_one_of_its_holders_is_not_lost() -> None:
    """What a worker asks before it takes up its step again."""
    table = placement([(0, 0), (0, 1)], [(0, 0), (0, 2)], [(0, 1), (0, 2)])
    members = [worker.member for worker in table.workers]
    assert table.is_covered_without(())
    assert all(table.is_covered_without([member]) for member in members)
    assert not table.is_covered_without(members[:2])
    assert not placement([(0, 0)]).is_covered_without(())


@given(data=st.data(), num_workers=st.integers(1, 6), num_layers=st.integers(1, 4), num_experts=st.integers(1, 9))
def test_spread_is_balanced(data: st.DataObject, num_workers: int, num_layers: int, num_experts: int) -> None:
    """Every expert as often as asked, on distinct workers; slots equal to within one, per layer and in total."""
    replicas = data.draw(st.integers(1, num_workers))
    table = spread(EpochId(3, 1), "abc", workers(num_workers), num_layers, num_experts, replicas)
    table.validate()
    assert table.epoch == EpochId(3, 1)
    for layer in range(num_layers):
        assert all(len(set(holders(table, layer, expert))) == replicas for expert in range(num_experts))
        counts = Counter(index for expert in range(num_experts) for index in holders(table, layer, expert))
        per_worker = [counts[index] for index in range(num_workers)]
        assert max(per_worker) - min(per_worker) <= 1
    totals = [len(worker.experts) for worker in table.workers]
    assert max(totals) - min(totals) <= 1


@pytest.mark.parametrize("replicas", [0, 3])
def test_spread_refuses_replicas_it_has_no_workers_for(replicas: int) -> None:
    """A second copy on the same worker would die with the first."""
    with pytest.raises(PlacementError, match=f"replicas: {replicas}; must be 1 to 2"):
        spread(EpochId(1, 1), "abc", workers(2), 1, 4, replicas)


def test_a_placement_survives_the_wire() -> None:
    """Slot order included: it is how a worker's slots are filled."""
    table = spread(EpochId(2**40, 7), "abc", workers(3), 4, 5, 2)
    encoded = placement_to_pb(table).SerializeToString()
    assert placement_from_pb(control_pb2.PlacementTable.FromString(encoded)) == table


def test_a_bad_table_is_refused_off_the_wire() -> None:
    """An order from outside is checked before it is an object of ours."""
    message = placement_to_pb(placement(ALL))
    message.workers[0].experts.append(3)
    with pytest.raises(PlacementError, match="layer 1, expert 0"):
        placement_from_pb(message)
    with pytest.raises(PlacementError, match="0 layers of 0 experts"):
        placement_from_pb(control_pb2.PlacementTable())

"""Faults of a network as decisions: reproducible, as frequent as asked for, and true to what a wire can do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement import Member
from router.transport.faults import Faults, Leg, Wire, fate

ATTENTION, EXPERT = Member("attention-0", 1), Member("expert-0", 1)
PLAIN = Leg(is_lost=False, may_be_overtaken=False, delay_s=0.0)
OVERTAKEN = Leg(is_lost=False, may_be_overtaken=True, delay_s=5.0)


def test_a_fate_depends_on_seed_link_and_number_alone() -> None:
    """Whoever asks, in whatever order; and no two exchanges share one."""
    faults = Faults(seed=7, loss=0.5, delay_s=1.0)
    forth = [fate(faults, ATTENTION, EXPERT, number) for number in range(50)]
    back = [fate(faults, ATTENTION, EXPERT, number) for number in reversed(range(50))]
    assert forth == back[::-1]
    others = [
        fate(Faults(seed=8, loss=0.5, delay_s=1.0), ATTENTION, EXPERT, 0),
        fate(faults, Member("attention-0", 2), EXPERT, 0),
        fate(faults, ATTENTION, Member("expert-1", 1), 0),
    ]
    delays = [one.out.delay_s for one in forth + others] + [one.back.delay_s for one in forth + others]
    assert len(set(delays)) == len(delays)


def test_faults_are_as_frequent_as_asked_for() -> None:
    """Each on its own, out and back."""
    faults = Faults(seed=1, loss=0.1, duplicate=0.2, reorder=0.3, death=0.05)
    fates = [fate(faults, ATTENTION, EXPERT, number) for number in range(4000)]
    for expected, happened in (
        (0.1, [one.out.is_lost for one in fates]),
        (0.1, [one.back.is_lost for one in fates]),
        (0.3, [one.out.may_be_overtaken for one in fates]),
        (0.3, [one.back.may_be_overtaken for one in fates]),
        (0.2, [one.is_duplicated for one in fates]),
        (0.05, [one.is_deadly for one in fates]),
    ):
        assert math.isclose(sum(happened) / len(fates), expected, abs_tol=0.02)


@given(st.integers(), st.integers(0, 2**40))
def test_by_default_nothing_happens(seed: int, number: int) -> None:
    """A wrapped transport without faults is that transport."""
    one = fate(Faults(seed=seed), ATTENTION, EXPERT, number)
    assert one.out == one.back == PLAIN
    assert not one.is_duplicated
    assert not one.is_deadly
    assert Wire(Faults()).arrival_s(3.0, 1 << 30, one.out) == 3.0


def test_a_message_occupies_its_wire_and_arrives_a_latency_later() -> None:
    """Two sent together share the bandwidth, not the latency; a wire that was idle begins at once."""
    wire = Wire(Faults(latency_s=2.0, bytes_per_s=10.0))
    assert wire.arrival_s(0.0, 10, PLAIN) == 3.0
    assert wire.arrival_s(0.0, 10, PLAIN) == 4.0
    assert wire.arrival_s(0.5, 20, PLAIN) == 6.0
    assert wire.arrival_s(100.0, 10, PLAIN) == 103.0


def test_only_who_may_be_overtaken_is() -> None:
    """A delay holds up those behind, as in one stream; a detour does not."""
    wire = Wire(Faults())
    assert wire.arrival_s(0.0, 1, OVERTAKEN) == 5.0
    assert wire.arrival_s(0.0, 1, PLAIN) == 0.0
    assert wire.arrival_s(1.0, 1, Leg(False, False, 3.0)) == 4.0
    assert wire.arrival_s(2.0, 1, PLAIN) == 4.0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1000), st.booleans(), st.floats(0, 1)), max_size=30))
def test_no_wire_is_faster_than_its_width_and_length(sent: list[tuple[float, int, bool, float]]) -> None:
    """Whatever is sent: not before it could be there, and in order unless it may be overtaken."""
    wire = Wire(Faults(latency_s=0.25, bytes_per_s=1000.0))
    now_s, queued_s, newest_s = 0.0, 0.0, 0.0
    for gap_s, nbytes, overtaken, delay_s in sent:
        now_s += gap_s
        queued_s = max(queued_s, now_s) + nbytes / 1000.0
        there_s = wire.arrival_s(now_s, nbytes, Leg(False, overtaken, delay_s))
        assert there_s >= queued_s + 0.25
        assert there_s >= newest_s
        if not overtaken:
            newest_s = there_s


def test_faults_are_read_from_a_line() -> None:
    """As a transport's name carries them to other processes."""
    assert Faults.parse("") == Faults()
    assert Faults.parse("seed=3,loss=0.5,bytes_per_s=1e9") == Faults(seed=3, loss=0.5, bytes_per_s=1e9)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("losses=1", "'losses=1'; must be name=value, the name one of seed, loss"),
        ("loss", "loss: ''; must be a number"),
        ("loss=some", "loss: 'some'; must be a number"),
        ("seed=1.5", "seed: '1.5'"),
        ("loss=1.5", "loss: 1.5; must be 0 to 1"),
        ("death=nan", "death: nan; must be 0 to 1"),
        ("latency_s=-1", "latency_s: -1.0; must be 0 or more"),
        ("delay_s=inf", "delay_s: inf"),
        ("bytes_per_s=0", "bytes_per_s: 0.0; must be above 0"),
        ("bytes_per_s=nan", "bytes_per_s: nan; must be above 0"),
    ],
)
def test_what_is_no_fault_is_refused_by_name(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Faults.parse(line)

"""Promises of the expert batcher: joins a layer's parcels, waits within a bound, starves nobody, loses none."""

from collections import Counter

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from expert_workers.batcher import Batcher
from router.placement import EpochId, Member
from router.transport.base import Parcel

LAYERS, WAIT_S = 4, 1.0


def parcel(sender, layer, routes=3, ticket=0):
    empty = torch.empty(0)
    return Parcel(
        Member(sender, 1), Member("e0", 1), EpochId(1, 1), ticket, layer, empty, empty.expand(routes, 0), empty
    )


def batcher(rows_max=100, parcels_max=64, join_wait_s=WAIT_S):
    return Batcher(LAYERS, rows_max, parcels_max, join_wait_s)


def one(own, sender, layer, now_s):
    """A parcel that comes alone and is computed at once."""
    own.add(only := parcel(sender, layer), now_s)
    assert own.next_batch(now_s) == [only]


def teach(own, sender, layer, takes_s, now_s):
    """Its parcel for the layer before comes now; from there to this layer it took so long the last time."""
    before = (layer - 1) % LAYERS
    own.add(first := parcel(sender, before), now_s - 10.0)
    own.add(second := parcel(sender, layer), now_s - 10.0 + takes_s)
    assert [own.next_batch(now_s - 5.0), own.next_batch(now_s - 5.0)] == [[first], [second]]
    one(own, sender, before, now_s)


def test_a_batch_is_the_oldest_parcel_and_all_of_its_layer():
    own = batcher()
    for p in (first := parcel("a", 2), other := parcel("a", 1), mate := parcel("b", 2)):
        own.add(p, 0.0)
    assert own.next_batch(0.0) == [first, mate]
    assert own.next_batch(0.0) == [other]
    assert (len(own), own.next_batch(0.0), own.wait_s(0.0)) == (0, [], None)


def test_a_batch_is_bounded_but_never_empty():
    """A parcel larger than the bound is computed alone rather than never."""
    own = batcher(rows_max=4)
    for p in (big := parcel("a", 0, 9), small := parcel("a", 0, 2), mate := parcel("a", 0, 2)):
        own.add(p, 0.0)
    assert own.next_batch(0.0) == [big]
    assert own.next_batch(0.0) == [small, mate]


def test_a_small_parcel_does_not_overtake_its_peers_large_one():
    own = batcher(rows_max=4)
    for p in (first := parcel("a", 0, 3), large := parcel("a", 0, 2), small := parcel("a", 0, 1)):
        own.add(p, 0.0)
    assert own.next_batch(0.0) == [first]
    assert own.next_batch(0.0) == [large, small]


def test_who_floods_a_layer_gets_as_much_of_a_batch_as_others():
    own = batcher(rows_max=12)
    flood = [parcel("flood", 1) for _ in range(9)]
    for p in (*flood, one := parcel("b", 1), two := parcel("b", 1)):
        own.add(p, 0.0)
    assert own.next_batch(0.0) == [flood[0], one, flood[1], two]


def test_a_parcel_is_held_for_whoever_asks_for_the_same_layer_soon():
    own = batcher()
    teach(own, "b", 2, takes_s=0.3, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.1)
    assert own.next_batch(20.2) == []
    assert own.wait_s(20.2) == pytest.approx(0.4)  # until twice its usual time
    own.add(theirs := parcel("b", 2), 20.3)
    assert own.next_batch(20.3) == [mine, theirs]


def test_the_first_layer_follows_the_last():
    own = batcher()
    teach(own, "b", 0, takes_s=0.3, now_s=20.0)
    own.add(parcel("a", 0), 20.1)
    assert own.next_batch(20.2) == []


def test_a_parcel_is_held_for_whoever_is_some_layers_behind_if_those_are_quick():
    own = batcher()
    for layer, now_s in ((1, 10.0), (2, 10.2), (3, 10.5), (1, 20.0)):
        one(own, "b", layer, now_s)
    own.add(mine := parcel("a", 3), 20.1)
    assert own.wait_s(20.1) == pytest.approx(0.9)  # twice 0.2 + 0.3
    one(own, "b", 2, 20.2)
    assert own.wait_s(20.2) == pytest.approx(0.6)  # twice 0.3
    own.add(theirs := parcel("b", 3), 20.5)
    assert own.next_batch(20.5) == [mine, theirs]


def test_nobody_is_held_for_a_peer_that_takes_longer_than_the_wait():
    own = batcher()
    teach(own, "slow", 2, takes_s=1.2, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.1)
    assert own.next_batch(20.1) == [mine]


def test_but_for_its_last_moments_a_slow_peer_is_waited_for():
    own = batcher()
    teach(own, "slow", 2, takes_s=1.2, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.9)
    assert own.next_batch(21.8) == []
    assert own.next_batch(21.9) == [mine]


def test_only_from_one_layer_to_the_next_is_anything_learned():
    own = batcher()
    for layer, now_s in ((0, 10.0), (2, 10.3), (1, 20.0)):
        one(own, "b", layer, now_s)
    one(own, "a", 2, 20.1)


def test_a_dead_peer_costs_one_wait():
    """It is waited for until its time is over, and then not again."""
    own = batcher()
    teach(own, "dead", 2, takes_s=0.4, now_s=20.0)
    own.add(second := parcel("a", 2), 20.1)
    assert own.next_batch(20.7) == []
    assert own.next_batch(20.8) == [second]
    for step in range(2 * LAYERS):
        one(own, "a", (3 + step) % LAYERS, now_s=20.9 + step / 10)


def test_a_peer_that_comes_again_and_again_extends_no_wait():
    """Held since 20.1: over at 21.1, though by then another one's is expected at 21.05."""
    own = batcher()
    teach(own, "b", 2, takes_s=0.15, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.1)
    own.add(parcel("b", 1), 20.9)
    assert own.next_batch(20.9)[0].layer == 1
    assert own.next_batch(21.05) == []
    assert own.next_batch(21.1) == [mine]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_nobody_is_held_for_a_peer_that_is_elsewhere_in_the_model(layer):
    own = batcher()
    teach(own, "b", 2, takes_s=0.3, now_s=19.0)
    one(own, "b", layer, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.1)
    assert own.next_batch(20.1) == [mine]


def test_who_is_alone_never_waits():
    own = batcher()
    for step in range(3 * LAYERS):
        one(own, "a", step % LAYERS, now_s=step / 10)


@pytest.mark.parametrize(("pause_s", "is_held"), [(9.0, True), (99.0, False)])
def test_what_is_known_of_a_peer_is_forgotten_when_it_stays_away(pause_s, is_held):
    """So that the dead take no memory."""
    own = batcher()
    teach(own, "b", 2, takes_s=0.3, now_s=20.0)
    one(own, "a", 0, now_s=20.0 + pause_s)
    one(own, "b", 1, 20.0 + pause_s)
    own.add(mine := parcel("a", 2), 20.1 + pause_s)
    assert own.next_batch(20.1 + pause_s) == ([] if is_held else [mine])


def test_with_no_wait_configured_nothing_is_held():
    own = batcher(join_wait_s=0.0)
    teach(own, "b", 2, takes_s=0.0, now_s=20.0)
    own.add(mine := parcel("a", 2), 20.0)
    assert own.next_batch(20.0) == [mine]


def test_while_one_parcel_is_held_another_is_computed():
    own = batcher()
    teach(own, "b", 2, takes_s=0.3, now_s=20.0)
    own.add(held := parcel("a", 2), 20.1)
    own.add(ripe := parcel("c", 0), 20.1)
    assert own.next_batch(20.1) == [ripe]
    assert own.next_batch(20.6) == [held]


def test_when_hands_are_full_nothing_is_held():
    own = batcher(parcels_max=2)
    teach(own, "b", 2, takes_s=0.3, now_s=20.0)
    own.add(parcel("a", 2), 20.1)
    assert own.next_batch(20.1) == []
    own.add(parcel("a", 2), 20.1)
    assert own.is_full
    assert len(own.next_batch(20.1)) == 2


PEERS = "abcd"
arrivals = st.tuples(
    st.sampled_from(PEERS), st.sampled_from([None, None, 0, 1]), st.integers(1, 6)
)  # None: the next layer
moments = st.tuples(st.lists(arrivals, max_size=6), st.sampled_from([0.0, 0.1, 0.4, 1.5]))


@given(st.lists(moments, min_size=1, max_size=25), st.sampled_from([0.0, WAIT_S]), st.integers(1, 20))
def test_any_story_loses_nothing_starves_nobody_and_waits_within_its_bound(story, join_wait_s, rows_max):
    """Each batch: one layer, within `rows_max`, a peer's of a layer in order, nothing held beyond the wait.

    Starvation: a parcel behind k of its own peer's is answered within the next (k + 1) x peers batches after
    its wait, whoever floods; here one batch a moment, while up to six parcels come.
    """
    own, now_s, number = Batcher(2, rows_max, 8, join_wait_s), 100.0, 0
    waiting: dict[int, tuple[Parcel, float]] = {}  # by ticket, which is the order of arrival
    left: dict[int, int] = {}  # batches until it must have been answered, once its wait is over
    last = dict.fromkeys(PEERS, 0)  # layer
    answered = Counter()

    def compute():
        for ticket, (p, since_s) in waiting.items():
            if now_s >= since_s + join_wait_s and ticket not in left:
                ahead = sum(o.sender == p.sender and t < ticket for t, (o, _) in waiting.items())
                left[ticket] = (ahead + 1) * len(PEERS)
        must_answer = bool(left) or own.is_full
        wait_s, batch = own.wait_s(now_s), own.next_batch(now_s)
        assert bool(batch) == (wait_s == 0.0)
        assert wait_s is None or wait_s <= join_wait_s
        assert batch or not must_answer
        event("held" if waiting and not batch else f"parcels in a batch: {min(len(batch), 4)}")
        if batch:
            assert len({p.layer for p in batch}) == 1
            assert len(batch) == 1 or sum(len(p.route_rows) for p in batch) <= rows_max
        for p in batch:
            assert not any(o.ticket < p.ticket and (o.sender, o.layer) == (p.sender, p.layer)
                           for o, _ in waiting.values())  # fmt: skip
            del waiting[p.ticket]
            left.pop(p.ticket, None)
            answered[p.ticket] += 1
        for ticket in left if batch else ():
            left[ticket] -= 1
            assert left[ticket] > 0, f"{waiting[ticket][0].sender} starves"
        assert len(own) == len(waiting)

    for coming, pause_s in story:
        for sender, layer, routes in coming:
            number += 1
            layer = last[sender] = 1 - last[sender] if layer is None else layer
            waiting[number] = parcel(sender, layer, routes, number), now_s
            own.add(waiting[number][0], now_s)
        compute()
        now_s += pause_s
    while waiting:
        now_s += join_wait_s
        compute()
    assert answered == dict.fromkeys(range(1, number + 1), 1)


def test_a_flood_delays_another_by_one_batch():
    """Sixteen parcels wait, each of them a batch of its own, and as many keep coming."""
    own = batcher(rows_max=3)
    for number in range(16):
        own.add(parcel("flood", number % LAYERS), 0.0)
    own.add(late := parcel("b", 3), 0.0)
    own.next_batch(0.0)
    own.add(parcel("flood", 3), 0.0)
    assert own.next_batch(0.0) == [late]

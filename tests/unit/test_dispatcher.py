"""The dispatcher: losses and refusals are planned again and leave no trace in the sum."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.gate import Routes
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import ExpertsUnavailable, ParcelMalformed, PlacementError
from router.placement import EpochId, Member, PlacedWorker, Placement, spread
from router.transport.base import ExpertEnd, LinkIdentity, Parcel, RefusalReason
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import CONFIG, HIDDEN, ExpertThread, answer, computed, identity
from tests.unit.placement_table import holders

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 8, 3
CONFIG = replace(CONFIG, overload_pause_s=0.0)
Behaviour = Callable[[ExpertEnd, Parcel], None]


def batch(num_tokens: int = 5, seed: int = 0) -> tuple[Tensor, Routes]:
    chance = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(NUM_EXPERTS, generator=chance)[:TOP_K] for _ in range(num_tokens)]
    weights = torch.rand(num_tokens, TOP_K, generator=chance)
    rows = torch.randn(num_tokens, HIDDEN, generator=chance)
    return rows, Routes(torch.stack(ids) if ids else torch.zeros(0, TOP_K, dtype=torch.int64), weights)


def direct(layer: int, rows: Tensor, routes: Routes) -> Tensor:
    """[T, H]: what the experts of exchange_parties make of it, all in one place."""
    total = torch.zeros(rows.shape)
    for rank in range(TOP_K):
        everything = torch.arange(len(rows), dtype=torch.int32)
        chosen = routes.expert_ids[:, rank].int()
        one = Parcel(Member("", 0), Member("", 0), EpochId(0, 0), 0, layer, rows, everything, chosen)
        total += routes.weights[:, rank : rank + 1] * computed(one)
    return total


class Stage:
    """An attention worker's dispatcher, and expert workers that behave as told."""

    def __init__(self, stack: ExitStack, config: RouterConfig = CONFIG, kind: str = "local") -> None:
        self.stack = stack
        self.kind = kind
        self.hub = LocalHub()
        self.lost: list[Member] = []
        self.received: Counter[str] = Counter()
        me = identity()
        end = attention_end(kind, me, config, self.hub)
        self.dispatcher = Dispatcher(end, me.member, config, self.lost.append)
        stack.callback(self.dispatcher.close)

    def expert(self, name: str, behave: Behaviour = answer, incarnation: int = 1) -> ExpertThread:
        who: LinkIdentity = identity(name, incarnation)

        def count(end: ExpertEnd, parcel: Parcel) -> None:
            self.received[name] += 1
            behave(end, parcel)

        end = expert_end(self.kind, who, CONFIG, self.hub)
        return self.stack.enter_context(ExpertThread(end, who, count))

    def adopt(self, *experts: ExpertThread, replicas: int = 1, number: int = 1) -> Placement:
        members = [(expert.member, expert.end.address) for expert in experts]
        placement = spread(EpochId(1, number), "abc", members, NUM_LAYERS, NUM_EXPERTS, replicas)
        self.use(placement)
        return placement

    def use(self, placement: Placement) -> None:
        self.dispatcher.prepare(placement)
        assert self.dispatcher.adopt() == placement.epoch

    def exchange(self, layer: int = 1, seed: int = 0, num_tokens: int = 5) -> None:
        """One layer's exchange, whose sum has the very bits of the direct one."""
        rows, routes = batch(num_tokens, seed)
        merged = self.dispatcher.combine(self.dispatcher.dispatch(layer, rows, routes))
        assert torch.equal(merged, direct(layer, rows, routes))


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def refuse_first(reason: RefusalReason, times: int = 1) -> Behaviour:
    """Refuse so many parcels, then answer."""
    left = [times]

    def behave(end: ExpertEnd, parcel: Parcel) -> None:
        if left[0]:
            left[0] -= 1
            end.refuse(parcel, reason, "as told")
        else:
            answer(end, parcel)

    return behave


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_the_sum_does_not_depend_on_the_number_of_workers(stage: Stage, num_experts: int) -> None:
    """Rule 2, through plan, transport and merge together."""
    stage.adopt(*[stage.expert(f"expert-{number}") for number in range(num_experts)])
    for seed in range(20):
        stage.exchange(layer=seed % NUM_LAYERS, seed=seed, num_tokens=seed % 7)


def test_a_loss_mid_layer_is_planned_again_with_identical_bits(stage: Stage) -> None:
    """An expert worker dies with our rows in its hands; the step does not notice."""
    dying = stage.expert("expert-0", lambda end, _: end.close())
    others = [stage.expert(f"expert-{number}") for number in (1, 2)]
    stage.adopt(dying, *others, replicas=2)
    stage.exchange()
    assert stage.lost == [dying.member]
    assert stage.dispatcher.lost == {dying.member}
    counters = stage.dispatcher.counters()
    assert (counters["replans"], counters["lost"], counters["refused_peer_lost"]) == (1, 1, 1)
    stage.exchange(layer=0)  # now planned without it at once
    assert stage.dispatcher.counters()["replans"] == 1
    assert stage.received["expert-0"] == 1


def test_a_hung_worker_is_lost_at_the_deadline() -> None:
    """A frozen process keeps its socket: only the deadline tells."""
    with ExitStack() as stack:
        stage = Stage(stack, replace(CONFIG, combine_timeout_s=0.05))
        hung = stage.expert("expert-0", lambda _end, _parcel: None)
        stage.adopt(hung, stage.expert("expert-1"), replicas=2)
        stage.exchange()
        assert stage.lost == [hung.member]


def test_without_a_live_replica_the_experts_are_named(stage: Stage) -> None:
    """Never a wrong answer: the caller waits for a placement that has them, then goes on."""
    dying, well = stage.expert("expert-0", lambda end, _: end.close()), stage.expert("expert-1")
    placement = stage.adopt(dying, well)
    rows, routes = batch()
    gone = {expert for expert in range(NUM_EXPERTS) if holders(placement, 1, expert) == (0,)}
    with pytest.raises(ExpertsUnavailable) as caught:
        stage.dispatcher.combine(stage.dispatcher.dispatch(1, rows, routes))
    assert caught.value.layer == 1
    assert caught.value.experts == gone & set(routes.expert_ids.flatten().tolist())
    with pytest.raises(ExpertsUnavailable):
        stage.dispatcher.dispatch(1, rows, routes)
    stage.adopt(well, number=2)
    stage.exchange()


def test_a_lost_worker_is_lost_until_an_epoch_omits_it(stage: Stage) -> None:
    """A new life under the same id is another member."""
    dying, well = stage.expert("expert-0", lambda end, _: end.close()), stage.expert("expert-1")
    stage.adopt(dying, well, replicas=2)
    stage.exchange()
    stage.adopt(dying, well, replicas=2, number=2)
    assert stage.dispatcher.lost == {dying.member}
    reborn = stage.expert("expert-0", incarnation=2)
    stage.adopt(reborn, well, replicas=2, number=3)
    assert stage.dispatcher.lost == frozenset()
    stage.exchange()
    assert stage.lost == [dying.member] * 2  # when it was found, and when an epoch still had it


def test_who_is_lost_is_told_again_with_an_epoch_that_still_has_it(stage: Stage) -> None:
    """Who was told may have died with the news: a new controller would place experts on it for ever."""
    dying, well = stage.expert("expert-0", lambda end, _: end.close()), stage.expert("expert-1")
    stage.adopt(dying, well, replicas=2)
    stage.exchange()
    stage.lost.clear()
    stage.adopt(dying, well, replicas=2)  # the same, as a controller's catching up gives it
    assert stage.lost == [dying.member]


def test_a_worker_that_cannot_be_linked_is_lost_from_the_start(stage: Stage) -> None:
    """The others carry the epoch."""
    well = stage.expert("expert-0")
    absent = PlacedWorker(Member("expert-9", 1), "local:nowhere", ((1, 0),))
    every = tuple((layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS))
    present = PlacedWorker(well.member, well.end.address, every)
    stage.use(Placement(EpochId(1, 1), "abc", NUM_LAYERS, NUM_EXPERTS, (absent, present)))
    assert stage.lost == [absent.member]
    stage.exchange()


@pytest.mark.parametrize(
    "reason", [RefusalReason.NOT_RESIDENT, RefusalReason.STALE_EPOCH, RefusalReason.WRONG_INCARNATION]
)
def test_who_refuses_is_avoided_where_others_hold_the_experts(stage: Stage, reason: RefusalReason) -> None:
    """It is alive: nobody is told of a loss, and the next layer asks it again."""
    refusing = stage.expert("expert-0", refuse_first(reason))
    stage.adopt(refusing, stage.expert("expert-1"), replicas=2)
    stage.exchange()
    assert stage.received["expert-0"] == 1
    assert stage.lost == []
    stage.exchange()
    assert stage.received["expert-0"] == 2


def test_one_expert_that_is_not_resident_does_not_cost_its_neighbours(stage: Stage) -> None:
    """A parcel is refused as a whole; what only that worker holds is offered to it again, alone."""

    def without_expert_0(end: ExpertEnd, parcel: Parcel) -> None:
        if 0 in parcel.route_experts.tolist():
            end.refuse(parcel, RefusalReason.NOT_RESIDENT, "expert 0")
        else:
            answer(end, parcel)

    one, two = stage.expert("expert-0", without_expert_0), stage.expert("expert-1")
    workers = (
        PlacedWorker(one.member, one.end.address, ((1, 0), (1, 1))),
        PlacedWorker(two.member, two.end.address, ((1, 0), (1, 3))),
    )
    stage.use(Placement(EpochId(1, 1), "abc", NUM_LAYERS, NUM_EXPERTS, workers))
    rows, routes = batch(num_tokens=1)
    routes = Routes(torch.tensor([[0, 1, 3]]), routes.weights)  # expert 0: a tie, hence the first worker
    merged = stage.dispatcher.combine(stage.dispatcher.dispatch(1, rows, routes))
    assert torch.equal(merged, direct(1, rows, routes))
    assert stage.received["expert-0"] == 2


def test_a_full_worker_is_asked_again(stage: Stage) -> None:
    """Overload is no loss; with one replica there is nobody else."""
    stage.adopt(stage.expert("expert-0", refuse_first(RefusalReason.OVERLOADED, times=3)))
    stage.exchange()
    assert stage.dispatcher.counters()["refused_overloaded"] == 3
    assert stage.lost == []


def test_a_worker_that_stays_full_is_left_for_its_replica(stage: Stage) -> None:
    """Its link may be full of what a frozen worker never answers: that is no reason to give the step up."""
    full = stage.expert("expert-0", refuse_first(RefusalReason.OVERLOADED, times=99))
    stage.adopt(full, stage.expert("expert-1"), replicas=2)
    stage.exchange()
    assert stage.received["expert-0"] == 1
    assert stage.lost == []


def test_asking_again_is_bounded(stage: Stage) -> None:
    """A worker that always refuses must not hold the step for ever; the bound is named."""
    stage.adopt(stage.expert("expert-0", refuse_first(RefusalReason.OVERLOADED, times=99)))
    rows, routes = batch()
    with pytest.raises(ExpertsUnavailable, match="OVERLOADED, as told, after 4 replans"):
        stage.dispatcher.combine(stage.dispatcher.dispatch(1, rows, routes))
    assert stage.received["expert-0"] == 1 + CONFIG.replans_max


def test_a_malformed_parcel_is_an_error_not_a_retry(stage: Stage) -> None:
    """Sent again it would be malformed again."""
    stage.adopt(stage.expert("expert-0", refuse_first(RefusalReason.MALFORMED)))
    rows, routes = batch()
    with pytest.raises(ParcelMalformed, match="as told"):
        stage.dispatcher.combine(stage.dispatcher.dispatch(1, rows, routes))
    assert stage.received["expert-0"] == 1
    stage.exchange()


def test_two_microbatches_in_flight_do_not_meet(stage: Stage) -> None:
    """Also when a worker dies between them, and whichever is combined first."""
    dying, well = stage.expert("expert-0", lambda end, _: end.close()), stage.expert("expert-1")
    stage.adopt(dying, well, replicas=2)
    batches = [batch(seed=seed) for seed in (1, 2)]
    pendings = [stage.dispatcher.dispatch(0, rows, routes) for rows, routes in batches]
    for place in (1, 0):
        rows, routes = batches[place]
        assert torch.equal(stage.dispatcher.combine(pendings[place]), direct(0, rows, routes))


def test_an_abandoned_dispatch_gives_its_capacity_back() -> None:
    """A step given up must not eat the link."""
    with ExitStack() as stack:
        stage = Stage(stack, replace(CONFIG, parcels_in_flight_max=1, replans_max=0))
        answered = threading.Semaphore(0)

        def tell(end: ExpertEnd, parcel: Parcel) -> None:
            answer(end, parcel)
            answered.release()

        stage.adopt(stage.expert("expert-0", tell))
        for _ in range(5):
            pending = stage.dispatcher.dispatch(0, *batch())
            stage.dispatcher.abandon(pending)
            stage.dispatcher.abandon(pending)
            assert answered.acquire(timeout=20)
        stage.exchange()


def test_counters_say_what_was_sent(stage: Stage) -> None:
    """Rows once per worker, routes once in all."""
    stage.adopt(stage.expert("expert-0"))
    stage.exchange(num_tokens=5)
    assert stage.dispatcher.counters() == {"parcels": 1, "rows": 5, "routes": 5 * TOP_K}


def test_what_cannot_be_used_is_refused(stage: Stage) -> None:
    """An order of the past, use before the first placement, more rows than the link was made for."""
    rows, routes = batch()
    with pytest.raises(PlacementError, match="none adopted"):
        stage.dispatcher.dispatch(0, rows, routes)
    placement = stage.adopt(stage.expert("expert-0"), number=5)
    with pytest.raises(PlacementError, match="epoch"):
        stage.dispatcher.prepare(replace(placement, epoch=EpochId(1, 4)))
    with pytest.raises(ValueError, match="rows: 65; at most 64"):
        stage.dispatcher.dispatch(0, *batch(65))

"""Promises of the expert worker: joins what waits, waits for nobody, refuses what it must not compute."""

import queue
import threading
import time
from dataclasses import replace

import pytest
import torch

from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.service import ExpertService
from expert_workers.worker import ExpertWorker
from model import exact, memory
from model.checkpoint import Checkpoint
from model.device import HOST
from model.synthetic import make_checkpoint
from router.config import RouterConfig
from router.membership import Failed, HealthState, Prepared
from router.placement import EpochId, Member, PlacedWorker, Placement, spread
from router.transport.base import LinkIdentity, Parcel, Peer, Refusal, RefusalReason, Reply
from router.transport.local import LocalAttentionEnd, LocalExpertEnd, LocalHub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("expert") / "tiny"
    make_checkpoint("tiny", path, seed=1)
    return Checkpoint.open(path)


def parcel(layer=0, routes=3, to=Member("e0", 1), epoch=EpochId(1, 1), expert=0, sender="a0", hidden=4,
           ticket=1):  # fmt: skip
    return Parcel(
        Member(sender, 1), to, epoch, ticket, layer, torch.ones(1, hidden), torch.zeros(routes, dtype=torch.int32),
        torch.full((routes,), expert, dtype=torch.int32),
    )  # fmt: skip


def placement(checkpoint, *workers, epoch=EpochId(1, 1)):
    config = checkpoint.config
    return Placement(
        epoch, checkpoint.fingerprint, config.num_layers, config.num_experts,
        tuple(PlacedWorker(m, f"at-{m.id}", tuple(pairs)) for m, pairs in workers),
    )  # fmt: skip


def test_residency_loads_only_what_it_is_given_and_frees_what_no_epoch_wants(checkpoint):
    """An expert worker holds no attention weights, and no expert it was not given."""
    me = Member("e0", 1)
    residency = Residency(checkpoint, me, torch.float32, "exact", HOST)
    residency.prepare(placement(checkpoint, (me, [(0, 0), (0, 1), (1, 2)]), (Member("e1", 1), [(0, 3)])))
    one = residency.bytes_loaded // 3
    assert [sorted(residency.layer(layer)) for layer in (0, 1)] == [[0, 1], [2]]
    kept = residency.layer(0)[1]
    residency.prepare(placement(checkpoint, (me, [(0, 1), (1, 3)]), epoch=EpochId(1, 2)))
    assert residency.num_slots_used == 4
    residency.retire(EpochId(1, 1))
    assert [sorted(residency.layer(layer)) for layer in (0, 1)] == [[1], [3]]
    assert residency.layer(0)[1] is kept
    assert residency.bytes_loaded == 2 * one


@pytest.fixture
def pair(checkpoint):
    """A worker that holds expert 0 of layer 0, and an attention end linked to it."""
    hub, config = LocalHub(), RouterConfig(combine_timeout_s=10)
    me, peer = Member("e0", 1), Member("a0", 1)
    hidden = checkpoint.config.hidden_size

    def identity(member):
        return LinkIdentity(member, checkpoint.fingerprint, "t", hidden, torch.float32)

    residency = Residency(checkpoint, me, torch.float32, "exact", HOST)
    residency.prepare(placement(checkpoint, (me, [(0, 0)])))
    end = LocalExpertEnd(hub, identity(me), config)
    client = LocalAttentionEnd(hub, identity(peer), config)
    assert not client.adopt(client.prepare([Peer(me, end.address)], 5))
    yield ExpertWorker(residency, end, ExpertConfig(join_wait_s=0.1)), client
    client.close()
    end.close()


def test_a_parcel_that_is_held_wakes_its_worker_once(pair):
    """No spinning: one turn takes it in, the next sleeps until another joins or the wait is over."""
    worker, client = pair
    waits = []
    receive = worker.end.receive
    worker.end.receive = lambda wait_s: (waits.append(wait_s), receive(wait_s))[1]
    hidden, layers = worker.residency.checkpoint.config.hidden_size, worker.batcher.num_layers
    now_s = time.monotonic()
    for layer, ago_s in ((layers - 1, 9.05), (0, 9.0), (layers - 1, 0.0)):
        worker.batcher.add(other := parcel(layer, sender="a1"), now_s - ago_s)
        assert worker.batcher.next_batch(now_s) == [other]
    ticket = client.dispatch([parcel(hidden=hidden)])
    assert not worker.turn(0.0)
    assert worker.turn(5.0) or worker.turn(5.0)  # a wait may end a moment before its time
    assert isinstance(client.combine(ticket, 5)[0], Reply)
    held = [wait_s for wait_s in waits if 0 < wait_s < 5]
    assert 1 <= len(held) <= 2
    assert max(held) <= 0.1
    assert 0 < worker.held_s < 1
    assert (worker.batches, worker.parcels) == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"expert": 1}, RefusalReason.NOT_RESIDENT),
        ({"layer": 1}, RefusalReason.NOT_RESIDENT),
        ({"epoch": EpochId(0, 9)}, RefusalReason.STALE_EPOCH),
    ],
)
def test_a_parcel_for_what_is_not_held_is_refused_and_its_neighbours_are_answered(pair, wrong, reason):
    worker, client = pair
    worker.residency.oldest_epoch = EpochId(1, 0)
    hidden = worker.residency.checkpoint.config.hidden_size
    good, bad = parcel(hidden=hidden), parcel(hidden=hidden, ticket=2, **wrong)
    tickets = [client.dispatch([p]) for p in (good, bad)]
    while worker.turn(0.0):
        pass
    [[answered], [refused]] = [client.combine(t, 5) for t in tickets]
    assert isinstance(answered, Reply)
    assert isinstance(refused, Refusal)
    assert refused.reason is reason


def test_a_long_batch_pulses_between_its_products(pair, checkpoint):
    """Slow is not dead: who waits for the last expert hears of the first."""
    worker, client = pair
    me = worker.residency.member
    worker.residency.prepare(placement(checkpoint, (me, [(0, e) for e in range(3)]), epoch=EpochId(1, 2)))
    told = []
    pulse = worker.end.pulse
    worker.end.pulse = lambda: (told.append(1), pulse())
    hidden = checkpoint.config.hidden_size
    wide = replace(parcel(hidden=hidden), route_experts=torch.tensor([0, 1, 2], dtype=torch.int32))
    ticket = client.dispatch([wide])
    assert worker.turn(0.0)
    assert isinstance(client.combine(ticket, 5)[0], Reply)
    assert len(told) == 6  # two products each: no silence is longer than one of them


def test_the_service_prepares_in_the_background_and_leaves_no_thread(checkpoint):
    """Over shm, as a process runs it: listen, load, answer for health, stop."""
    before = set(threading.enumerate())
    events, happened = [], threading.Event()
    service = ExpertService(
        checkpoint.path, Member("e0", 1), "t", ExpertConfig(), RouterConfig(), "shm", "127.0.0.1", "cpu", 1.0,
        lambda e: (events.append(e), happened.set()),
    )  # fmt: skip
    service.start()
    assert service.address
    config = checkpoint.config
    service.prepare(
        spread(EpochId(1, 1), checkpoint.fingerprint, [(service.member, service.address)],
               config.num_layers, config.num_experts, 1)
    )  # fmt: skip
    assert happened.wait(30)
    health = service.health()
    service.stop(10)
    assert events == [Prepared(EpochId(1, 1))]
    assert health.state is HealthState.READY
    assert health.bytes_loaded == health.bytes_total > 0
    assert set(threading.enumerate()) == before


def test_a_placement_without_room_is_refused_and_the_one_in_use_goes_on(checkpoint, monkeypatch):
    """Scaling down may ask too much of a survivor: it says so, and neither fails nor forgets what it holds."""
    events = queue.Queue()
    service = ExpertService(
        checkpoint.path, Member("e0", 1), "t", ExpertConfig(), RouterConfig(), "shm", "127.0.0.1", "cpu", 1.0,
        events.put,
    )  # fmt: skip
    service.start()
    half = placement(checkpoint, (service.member, [(0, 0)]))
    service.prepare(half)
    assert events.get(timeout=30) == Prepared(half.epoch)
    before = service.health()
    monkeypatch.setattr(memory, "available_bytes", lambda _device: 10)
    whole = spread(EpochId(1, 9), checkpoint.fingerprint, [(service.member, service.address)],
                   checkpoint.config.num_layers, checkpoint.config.num_experts, 1)  # fmt: skip
    service.prepare(whole)
    refused = events.get(timeout=30)
    health = service.health()
    service.stop(10)
    assert refused.epoch == whole.epoch
    assert "expert weights need" in refused.why
    assert (health.state, health.bytes_loaded) == (HealthState.READY, before.bytes_loaded)


def test_what_loading_takes_is_counted_as_it_is_served(checkpoint):
    """A float32 checkpoint served in bfloat16 takes half of what is stored, and the other way round."""
    config, member = checkpoint.config, Member("e0", 1)
    table = placement(checkpoint, (member, [(0, 0), (1, 2)]))
    elements = 2 * 3 * config.hidden_size * config.expert_hidden
    for dtype in (torch.float32, torch.bfloat16):
        residency = Residency(checkpoint, member, dtype, "exact", HOST)
        assert residency.bytes_needed(table) == exact.bytes_kept(elements, dtype, HOST)
        residency.prepare(table)
        assert residency.bytes_needed(table) == 0


def test_a_bad_checkpoint_is_a_failure_with_its_reason(tmp_path):
    events = []
    service = ExpertService(
        tmp_path,
        Member("e0", 1),
        "t",
        ExpertConfig(),
        RouterConfig(),
        "shm",
        "127.0.0.1",
        "cpu",
        1.0,
        events.append,
    )
    service.start()
    assert service.health().state is HealthState.FAILED
    [failed] = events
    assert isinstance(failed, Failed)
    assert "config.json" in failed.detail
    service.stop(5)

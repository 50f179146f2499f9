"""Pools resized while they serve: stories, then random histories with losses in which nothing is freed too early.

The world asserts at every command: published only what is prepared, retired only what nobody uses, told to exit
only who is empty and in nobody's placement.
"""

from __future__ import annotations

import random

import pytest

from cluster.controller import ControllerConfig, Phase
from cluster.events import (
    WORKER_ROLES,
    Drain,
    Exit,
    KillWorker,
    Members,
    Pools,
    Prepare,
    Publish,
    Resize,
    Role,
    StartWorker,
    StopAll,
)
from cluster.overview import overview
from cluster.roster import Patience
from router.membership import Health, HealthState
from router.placement import Member
from tests.unit.controller_world import NO_SPARES, SHAPE, TWO_BY_THREE, World, ready, state
from tests.unit.placement_table import num_moves

ONE_BY_ONE = ControllerConfig(attention_workers=1, expert_workers=1)


def ids(world: World, role: Role) -> list[str]:
    return sorted(process.member.id for process in world.live(role))


def held(world: World) -> dict[str, int]:
    """Slots of each expert worker in the published placement."""
    return {w.member.id: len(w.experts) for w in world.controller.epochs.published.workers}


def test_experts_spread_to_newcomers_and_the_cluster_is_ready_all_the_while() -> None:
    world = ready(ONE_BY_ONE)
    world.tell(Resize(experts=3))
    phases = set()
    for _ in range(200):
        world.run(0.1)
        phases.add(world.controller.phase)
    assert phases == {Phase.READY}
    assert held(world) == {"expert-0": 4, "expert-1": 4, "expert-2": 4}
    assert [p.held.keys() for p in world.live(Role.EXPERT)] == [{world.controller.epochs.published.epoch}] * 3


def test_newcomers_load_only_their_share() -> None:
    world = ready(ONE_BY_ONE)
    before = world.controller.epochs.published
    world.tell(Resize(experts=2))
    world.run(20)
    assert num_moves(before, world.controller.epochs.published) == SHAPE.num_layers * SHAPE.num_experts // 2


def test_survivors_hold_everything_before_a_worker_leaves() -> None:
    """Prepared, published, adopted, retired; only then is it told to exit, and nobody is killed or started."""
    world = ready(ControllerConfig(1, 3))
    world.tell(Resize(experts=1))
    world.run(20)
    assert ids(world, Role.EXPERT) == ["expert-0"]
    assert held(world) == {"expert-0": 12}
    assert {send.to.id for send in world.sent(Exit)} == {"expert-1", "expert-2"}
    last_publish = max(i for i, c in enumerate(world.history) if c in world.sent(Publish))
    assert all(world.history.index(send) > last_publish for send in world.sent(Exit))
    assert not world.ordered(KillWorker)
    assert world.controller.phase is Phase.READY
    world.run(60)
    assert len(world.ordered(StartWorker)) == 4


def test_an_expert_worker_that_has_not_left_yet_stays_when_the_pool_grows_again() -> None:
    world = ready(ControllerConfig(1, 3))
    world.tell(Resize(experts=1))
    world.tell(Resize(experts=2))
    world.run(20)
    assert ids(world, Role.EXPERT) == ["expert-0", "expert-1"]
    assert world.one("expert-1").member.incarnation == 1


def test_an_id_that_is_used_again_has_a_higher_incarnation() -> None:
    """Also in the next term, which knows of those that have left."""
    world = ready(ControllerConfig(1, 2))
    for _ in range(2):
        world.tell(Resize(experts=1))
        world.run(20)
        world.restart_controller()
        world.run(20)
        world.tell(Resize(experts=2))
        world.run(20)
    assert world.one("expert-1").member.incarnation == 3


def test_a_draining_attention_worker_leaves_once_it_is_empty_and_no_sooner() -> None:
    world = ready()
    busy = world.one("attention-1")
    busy.empty_at_s = world.now_s + 40
    world.tell(Resize(attention=1))
    told = world.sent(Members)[-1].body
    assert told.draining == (busy.member,)
    assert busy.member in told.attention
    world.run(38)
    (worker,) = [w for w in overview(world.controller, {}, world.now_s)["workers"] if w["id"] == "attention-1"]
    assert worker["state"] == "draining"
    assert world.controller.phase is Phase.READY
    world.run(5)
    assert ids(world, Role.ATTENTION) == ["attention-0"]
    assert world.sent(Members)[-1].body.attention == (Member("attention-0", 1),)
    assert not world.ordered(KillWorker)


def test_a_draining_attention_worker_follows_placements() -> None:
    """Its sequences go on: an expert worker may leave meanwhile."""
    world = ready(ControllerConfig(2, 2))
    world.one("attention-1").empty_at_s = world.now_s + 60
    world.tell(Resize(attention=1, experts=1))
    world.run(30)
    assert world.one("attention-1").epoch == world.controller.epochs.published.epoch
    assert ids(world, Role.EXPERT) == ["expert-0"]


def test_a_draining_attention_worker_is_not_kept_but_another_is_started() -> None:
    """It may say just now that it is empty, and its word must not outlive the wish to drain it."""
    world = ready()
    world.one("attention-1").empty_at_s = world.now_s + 10
    world.tell(Resize(attention=1))
    world.tell(Resize(attention=2))
    world.run(30)
    assert ids(world, Role.ATTENTION) == ["attention-0", "attention-2"]


def test_a_wanted_worker_does_not_leave_because_it_is_empty() -> None:
    world = ready()
    gauges = {"sequences_open": 0.0}
    world.report(world.one("attention-0"), Health(HealthState.DRAINING, gauges=gauges))
    world.run(10)
    assert ids(world, Role.ATTENTION) == ["attention-0", "attention-1"]


def test_drain_names_who_leaves() -> None:
    world = ready()
    world.one("attention-0").empty_at_s = world.now_s + 5
    world.tell(Drain("attention-0"))
    world.tell(Drain("attention-0"))  # said twice is said once
    world.run(20)
    assert ids(world, Role.ATTENTION) == ["attention-1"]
    assert world.controller.phase is Phase.READY


def test_targets_survive_the_controller_and_a_draining_worker_still_leaves() -> None:
    world = ready(ControllerConfig(2, 3))
    world.one("attention-1").empty_at_s = world.now_s + 30
    world.tell(Resize(attention=1, experts=1))
    assert world.pools == Pools(("attention-0",), ("expert-0",), ("attention-1", "expert-1", "expert-2"))
    world.run(0.5)
    world.restart_controller()
    world.run(60)
    assert ids(world, Role.ATTENTION) == ["attention-0"]
    assert ids(world, Role.EXPERT) == ["expert-0"]
    assert world.pools == Pools(("attention-0",), ("expert-0",))
    assert world.controller.phase is Phase.READY


def test_a_worker_that_dies_while_it_leaves_is_not_replaced() -> None:
    world = ready()
    world.one("attention-1").empty_at_s = world.now_s + 60
    world.tell(Resize(attention=1))
    world.run(1)
    world.kill(Member("attention-1", 1))
    world.run(20)
    assert ids(world, Role.ATTENTION) == ["attention-0"]
    assert world.controller.phase is Phase.READY


def test_a_worker_that_does_not_exit_is_killed() -> None:
    world = ready(ControllerConfig(1, 2))
    leaver = world.one("expert-1")
    world.tell(Resize(experts=1))
    while not world.sent(Exit):
        world.run(0.001)
    world.freeze(leaver.member, 1000)
    world.run(14)
    assert not world.ordered(KillWorker)
    world.run(3)
    assert [kill.member for kill in world.ordered(KillWorker)] == [leaver.member]


def test_a_newcomer_that_dies_while_it_loads_is_started_again_and_the_epoch_with_it() -> None:
    world = ready(ONE_BY_ONE)
    world.tell(Resize(experts=2))
    while not [send for send in world.sent(Prepare) if send.to.id == "expert-1"]:
        world.run(0.05)
    world.kill(Member("expert-1", 1))
    world.run(30)
    assert held(world) == {"expert-0": 6, "expert-1": 6}
    assert world.one("expert-1").member.incarnation == 2
    assert world.controller.phase is Phase.READY


def test_a_survivor_that_cannot_hold_the_rest_keeps_the_leavers_and_says_why() -> None:
    """Prepare fails, nothing is committed, nobody is killed, and the target is what is there."""
    world = ready(ControllerConfig(1, 2))
    before = world.controller.epochs.published
    world.one("expert-0").slots_max = 10
    world.tell(Resize(experts=1))
    world.run(20)
    assert world.controller.epochs.published.workers == before.workers
    assert ids(world, Role.EXPERT) == ["expert-0", "expert-1"]
    assert world.pools == Pools(("attention-0",), ("expert-0", "expert-1"))
    assert overview(world.controller, {}, world.now_s)["scaling_failed"] == "expert-0: its memory is full"
    world.one("expert-0").slots_max = 12
    world.tell(Resize(experts=1))
    world.run(20)
    assert ids(world, Role.EXPERT) == ["expert-0"]


def test_a_worker_that_has_not_started_yet_is_ended_at_once() -> None:
    world = ready(ONE_BY_ONE)
    world.tell(Resize(attention=2, experts=2))
    world.tell(Resize(attention=1, experts=1))
    assert {kill.member.id for kill in world.ordered(KillWorker)} == {"attention-1", "expert-1"}
    world.run(20)
    assert ids(world, Role.ATTENTION) + ids(world, Role.EXPERT) == ["attention-0", "expert-0"]


def test_a_worker_that_does_not_serve_is_the_first_to_go() -> None:
    world = ready(ControllerConfig(2, 2, patience=Patience(restarts_max=0)))
    world.fails_to_start["attention-0"] = "no memory left"
    world.kill(Member("attention-0", 1))
    world.run(10)
    world.tell(Resize(attention=1))
    world.run(20)
    assert ids(world, Role.ATTENTION) == ["attention-1"]
    assert world.controller.phase is Phase.READY


def test_status_says_what_is_wanted_what_is_ready_and_what_leaves() -> None:
    world = ready(TWO_BY_THREE)
    world.one("attention-1").empty_at_s = world.now_s + 60
    world.tell(Resize(attention=1, experts=4))
    world.run(30)
    assert overview(world.controller, {}, world.now_s)["pools"] == {
        "attention": {"wanted": 1, "ready": 1, "leaving": 1},
        "expert": {"wanted": 4, "ready": 4, "leaving": 0},
    }


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (Resize(attention=0), "attention is 0; accepted: 1 to 256 workers"),
        (Resize(attention=257), "attention is 257; accepted: 1 to 256 workers"),
        (Resize(experts=1), "experts is 1; accepted: 2 (replicas) to 256 workers"),
        (Resize(attention=2, experts=-1), "experts is -1; accepted: 2 (replicas) to 256 workers"),
        (Resize(), "attention, experts is nothing; accepted: a number of workers for either, or for both"),
        (Drain("expert-9"), "worker is 'expert-9'; accepted: one of attention-0, attention-1, expert-0, "),
        (Drain("scheduler"), "worker is 'scheduler'; accepted: one of attention-0, "),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_changes_nothing(asked: Resize | Drain, complaint: str) -> None:
    world = ready()
    assert str(world.controller.refusal(asked)).startswith(complaint)
    before = len(world.history)
    world.tell(asked)
    assert len(world.history) == before
    assert world.pools is None


def test_the_last_of_a_pool_cannot_be_drained() -> None:
    world = ready(NO_SPARES)
    refused = world.controller.refusal(Drain("attention-0"))
    assert "a pool of more than 1; the attention pool has 1: scale it up first" in str(refused)


def test_a_pool_that_would_not_fit_into_memory_is_refused_before_anything_moves() -> None:
    world = ready(ControllerConfig(1, 3))
    gauges = {"memory_available_bytes": 7 * 2.0**30}
    for expert in world.live(Role.EXPERT):
        world.report(expert, Health(HealthState.READY, 4 << 30, 4 << 30, gauges=gauges, bytes_kept=4 << 30))
    assert world.controller.refusal(Resize(experts=2)) is None
    assert str(world.controller.refusal(Resize(experts=1))) == (
        "experts is 1; accepted: more: those that stay at here would need 8.00 GiB more memory for their experts, "
        "7.00 GiB are free"
    )


def test_a_cluster_that_stops_is_not_scaled() -> None:
    world = ready()
    world.tell(StopAll())
    assert "phase is draining" in str(world.controller.refusal(Resize(attention=3)))


@pytest.mark.parametrize("seed", range(8))
def test_random_sizes_under_random_losses_free_nothing_too_early_and_converge(seed: int) -> None:
    """The world's assertions hold at every command; and every expert is always in the published placement."""
    rng = random.Random(seed)
    replicas = rng.randint(1, 2)
    config = ControllerConfig(rng.randint(1, 3), rng.randint(2, 4), replicas, patience=Patience(restarts_max=999))
    world = World(config, seed)
    world.run(20)
    for _ in range(30):
        world.run(rng.uniform(0, 6))
        workers = [process.member for role in WORKER_ROLES for process in world.live(role)]
        match rng.choice(("resize", "resize", "resize", "drain", "kill", "freeze", "pause", "restart", "busy")):
            case "resize":
                world.tell(Resize(rng.randint(1, 3), rng.randint(replicas, 5)))
            case "drain" if workers:
                world.tell(Drain(rng.choice(workers).id))
            case "kill" if workers:
                world.kill(rng.choice(workers))
            case "freeze" if workers:
                world.freeze(rng.choice(workers), rng.uniform(1, 20))
            case "pause":
                world.pause_controller(rng.uniform(1, 15))
            case "restart":
                world.restart_controller()
            case "busy":  # the scheduler gives work to those that are not to leave
                for worker in world.controller.roster.wanted(Role.ATTENTION):
                    if worker.is_live:
                        world.processes[worker.member].empty_at_s = world.now_s + rng.uniform(1, 40)
        published = world.controller.epochs.published
        if published is not None:
            published.validate()
    world.run(30)
    sizes = {Role.ATTENTION: rng.randint(1, 3), Role.EXPERT: rng.randint(replicas, 5)}
    world.tell(Resize(sizes[Role.ATTENTION], sizes[Role.EXPERT]))
    world.run(150)
    controller = world.controller
    assert controller.phase is Phase.READY, overview(controller, {}, world.now_s)
    assert {role: len(world.live(role)) for role in sizes} == sizes
    published = controller.epochs.published
    published.validate()
    assert {p.epoch for p in world.live(Role.ATTENTION)} == {published.epoch}
    assert all(list(p.held) == [published.epoch] for p in world.live(Role.EXPERT))
    assert {state(world, w.id).value for w in controller.roster.workers.values()} == {"ready"}
    assert not world.pools or not world.pools.leaving

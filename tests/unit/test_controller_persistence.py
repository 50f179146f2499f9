"""The controller does not give up: restarts, companions that hang, workers that cannot start for now."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from cluster.controller import ControllerConfig, Phase
from cluster.events import KillWorker, Members, Role
from cluster.lifecycle import WorkerState
from cluster.overview import overview
from cluster.roster import Patience
from router.membership import Health, HealthState
from router.placement import Member
from tests.unit.controller_world import TWO_BY_THREE, World, ready, state


def test_restarts_are_bounded_and_further_apart_each_time() -> None:
    world = World(ControllerConfig(1, 2, 1, patience=Patience(restarts_max=3, backoff_s_min=1.0)))
    starts: list[float] = []
    for _ in range(200):
        world.run(0.5)
        newest = [p for p in world.live(Role.EXPERT) if p.member.id == "expert-0"]
        if newest:
            starts.append(world.now_s)
            world.kill(newest[0].member, "out of memory")
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert len(starts) == 4
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 2.0
    assert state(world, "expert-0") is WorkerState.FAILED
    assert world.controller.phase is Phase.FAILED


def test_worker_that_serves_between_its_deaths_is_never_given_up() -> None:
    """Restarts wait longer while it does not settle, and not at all once it has."""
    world = World(ControllerConfig(1, 2, 1, patience=Patience(restarts_max=1, settled_s=20)))
    world.run(15)
    for _ in range(4):
        world.kill(world.one("expert-0").member)
        world.run(15)
    assert world.one("expert-0").member.incarnation == 5
    assert world.controller.roster.workers["expert-0"].failures == 4
    world.run(60)
    world.kill(world.one("expert-0").member)
    world.run(10)
    assert world.controller.phase is Phase.READY
    assert world.controller.roster.workers["expert-0"].failures == 1


@pytest.mark.parametrize("name", ["scheduler", "gateway-0"])
def test_a_companion_that_says_it_hangs_is_killed_and_its_reason_kept(name: str) -> None:
    """Its heartbeats go on, so only its own word tells; Ray starts the next."""
    world = ready()
    hung = world.one(name)
    world.report(hung, Health(HealthState.FAILED, detail="loop has not turned for 6.0 s"))
    (kill,) = world.ordered(KillWorker)
    assert (kill.member, kill.pid) == (hung.member, hung.pid)
    world.run(1)
    document = overview(world.controller, {}, world.now_s)
    assert [(f["number"], f["id"], f["reason"]) for f in document["failures"]] == [
        (1, name, "loop has not turned for 6.0 s")
    ]
    assert world.controller.phase is Phase.DEGRADED


@pytest.mark.parametrize("name", ["scheduler", "gateway-0"])
def test_a_companion_that_is_silent_for_too_long_is_killed(name: str) -> None:
    world = ready()
    world.freeze(Member(name, 1), 300)
    world.run(world.config.companion_deadline_s - 2)
    assert not world.ordered(KillWorker)
    world.run(4)
    assert [kill.member for kill in world.ordered(KillWorker)] == [Member(name, 1)]


def test_the_scheduler_is_answered_at_each_heartbeat_by_the_process_it_watches() -> None:
    world = ready(replace(TWO_BY_THREE, pid=4321, node="here"))
    before = len(world.sent(Members))
    world.run(10)
    answers = [send for send in world.sent(Members)[before:] if send.to == Member("scheduler", 1)]
    assert len(answers) >= 9
    assert {(send.body.pid, send.body.node) for send in answers} == {(4321, "here")}


def test_a_cluster_that_has_served_never_gives_a_worker_up() -> None:
    """Tried again with growing, capped pauses that the status names; what kept it from serving may pass."""
    world = ready(ControllerConfig(1, 3, 1, patience=Patience(restarts_max=1, backoff_s_max=10.0)))
    world.fails_to_start["attention-0"] = "no memory left"
    world.kill(Member("attention-0", 1))
    waits = []
    for _ in range(240):
        world.run(0.5)
        (worker,) = [w for w in overview(world.controller, {}, world.now_s)["workers"] if w["id"] == "attention-0"]
        assert worker["state"] != "failed"
        if worker["next_start_s"]:
            assert re.fullmatch(r"next start in \d+ s, after: .*(killed|no memory left).*", worker["detail"])
            waits.append(worker["next_start_s"])
    assert worker["failures"] > 8
    assert 8.0 < max(waits) <= 10.0
    assert world.controller.phase is Phase.DEGRADED
    del world.fails_to_start["attention-0"]
    world.run(30)
    assert world.controller.phase is Phase.READY


def test_a_worker_given_up_by_a_new_term_is_tried_again_once_it_hears_that_the_cluster_has_served() -> None:
    world = ready(ControllerConfig(1, 2, 1, patience=Patience(restarts_max=0)))
    world.fails_to_start["attention-0"] = "no memory left"
    world.kill(Member("attention-0", 1))
    for expert in world.live(Role.EXPERT):
        world.freeze(expert.member, 20)
    world.restart_controller()
    world.run(10)
    assert state(world, "attention-0") is WorkerState.FAILED
    del world.fails_to_start["attention-0"]
    world.run(60)
    assert world.controller.phase is Phase.READY


def test_expert_worker_that_fails_to_start_after_service_leaves_its_experts_to_the_rest() -> None:
    world = ready(ControllerConfig(1, 3, 1, patience=Patience(restarts_max=0)))
    world.fails_to_start["expert-2"] = "no memory left"
    world.kill(Member("expert-2", 1))
    world.run(30)
    published = world.controller.epochs.published
    published.validate()
    assert [w.member.id for w in published.workers] == ["expert-0", "expert-1"]
    assert world.controller.phase is Phase.DEGRADED
    del world.fails_to_start["expert-2"]
    world.run(60)
    assert [w.member.id for w in world.controller.epochs.published.workers] == ["expert-0", "expert-1", "expert-2"]
    assert world.controller.phase is Phase.READY

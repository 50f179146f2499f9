"""The controller: stories, then random histories in which nothing forbidden happens and all ends well."""

from __future__ import annotations

import random

import pytest

from cluster.controller import ControllerConfig, Phase
from cluster.events import (
    WORKER_ROLES,
    Exit,
    KillWorker,
    Members,
    Prepare,
    Publish,
    Register,
    Report,
    Retire,
    Role,
    StartWorker,
    StopAll,
)
from cluster.lifecycle import TRANSITIONS, Change, IllegalChange, WorkerState, after
from cluster.overview import overview
from cluster.roster import Patience
from router.membership import Health, HealthState, PeerLost
from router.placement import EpochId, Member
from tests.unit.controller_world import NO_SPARES, SHAPE, TWO_BY_THREE, World, ready


def test_first_light_orders_places_prepares_publishes() -> None:
    """Everyone is started once; nothing is published before it is prepared; then the cluster is ready."""
    world = ready()
    assert {c.member.id for c in world.ordered(StartWorker)} == {
        "attention-0", "attention-1", "expert-0", "expert-1", "expert-2",
    }  # fmt: skip
    assert len(world.sent(Prepare)) == 3
    assert len(world.sent(Publish)) == 2
    published = world.controller.epochs.published
    assert published.epoch == EpochId(1, 1)
    assert {len(w.experts) for w in published.workers} == {SHAPE.num_layers * SHAPE.num_experts * 2 // 3}
    assert not world.ordered(KillWorker)


def test_members_are_told_to_scheduler_and_gateway() -> None:
    """Those who place and resume sequences know which attention workers count, also after a loss."""
    world = ready()
    told = {send.to.id: send.body.attention for send in world.sent(Members)}
    both = (Member("attention-0", 1), Member("attention-1", 1))
    assert told == {"scheduler": both, "gateway-0": both}
    world.kill(Member("attention-0", 1))
    world.run(20)
    told = {send.to.id: send.body.attention for send in world.sent(Members)}
    after_loss = (Member("attention-0", 2), Member("attention-1", 1))
    assert told == {"scheduler": after_loss, "gateway-0": after_loss}


def test_expert_loss_with_replicas_is_a_routing_change_then_a_replacement() -> None:
    """The survivors' epoch comes at once and loads nothing; the full one comes with the replacement."""
    world = ready()
    world.kill(Member("expert-1", 1))
    world.run(4)  # prepared by survivors and published, before the replacement has even registered
    placements = [send.body.placement for send in world.sent(Publish)]
    survivors = next(p for p in placements if p.epoch == EpochId(1, 2))
    assert [w.member.id for w in survivors.workers] == ["expert-0", "expert-2"]
    world.run(30)
    full = world.controller.epochs.published
    assert [(w.member.id, w.member.incarnation) for w in full.workers] == [
        ("expert-0", 1), ("expert-1", 2), ("expert-2", 1),
    ]  # fmt: skip
    assert [w.experts for w in full.workers] == [w.experts for w in placements[0].workers]
    assert world.controller.phase is Phase.READY


def test_expert_loss_without_replica_waits_for_the_replacement() -> None:
    """No epoch that lacks an expert is ever proposed: the next one is whole."""
    world = ready(NO_SPARES)
    world.kill(Member("expert-0", 1))
    world.run(30)
    assert {send.body.placement.epoch for send in world.sent(Prepare)} == {EpochId(1, 1), EpochId(1, 2)}
    for send in world.sent(Prepare):
        send.body.placement.validate()
    assert world.controller.phase is Phase.READY


def test_old_epochs_are_retired_once_everyone_has_left_them() -> None:
    world = ready()
    world.kill(Member("expert-2", 1))
    world.run(30)
    newest = world.controller.epochs.published.epoch
    assert world.sent(Retire)[-1].body.epoch == EpochId(newest.term, newest.number - 1)
    assert all(list(p.held) == [newest] for p in world.live(Role.EXPERT))


def test_silent_worker_is_killed_before_it_is_replaced() -> None:
    """A frozen process never acts beside its successor: SIGKILL comes first, and by its own pid."""
    world = ready()
    frozen = world.one("attention-1")
    world.freeze(frozen.member, 1000)
    world.run(20)
    (kill,) = world.ordered(KillWorker)
    assert (kill.member, kill.pid) == (frozen.member, frozen.pid)
    assert "silent" in kill.reason
    assert world.one("attention-1").member.incarnation == 2
    assert world.controller.phase is Phase.READY


def test_older_incarnation_is_told_to_exit() -> None:
    world = ready()
    world.kill(Member("expert-0", 1))
    world.run(30)
    ghost = Report(Member("expert-0", 1), SHAPE.fingerprint, 1, Health(HealthState.READY))
    world.tell(ghost)
    assert world.sent(Exit)[-1].to == Member("expert-0", 1)
    assert world.controller.phase is Phase.READY


def test_foreign_checkpoint_is_refused_by_name() -> None:
    world = ready()
    register = Register(Role.EXPERT, 1, "here", "cpu", "@x")
    world.tell(Report(Member("expert-0", 1), "beef", 1, register))
    assert "beef" in world.sent(Exit)[-1].body.reason
    assert "f00d" in world.sent(Exit)[-1].body.reason


def test_reason_a_worker_gives_at_start_is_final() -> None:
    """A bad checkpoint is the same on the second try: one start, phase failed, its own words in the status."""
    world = World(NO_SPARES)
    world.fails_to_start["expert-1"] = "model.safetensors is truncated"
    world.run(30)
    assert world.controller.phase is Phase.FAILED
    assert [c.member for c in world.ordered(StartWorker) if c.member.id == "expert-1"] == [Member("expert-1", 1)]
    document = overview(world.controller, {}, world.now_s)
    (worker,) = [w for w in document["workers"] if w["id"] == "expert-1"]
    assert (worker["state"], worker["detail"]) == ("failed", "model.safetensors is truncated")
    assert document["failures"][0]["reason"] == "model.safetensors is truncated"


def test_controller_that_was_frozen_judges_nobody_by_the_silence_it_slept_through() -> None:
    world = ready()
    world.pause_controller(60)
    world.run(90)
    assert not world.ordered(KillWorker)
    assert world.controller.phase is Phase.READY


def test_machine_that_slept_loses_nobody() -> None:
    """A suspended laptop: all clocks went on, nobody spoke, and nobody is late."""
    world = ready()
    for process in world.processes.values():
        world.freeze(process.member, 60)
    world.pause_controller(60)
    world.run(90)
    assert not world.ordered(KillWorker)
    assert world.controller.phase is Phase.READY


def test_worker_that_comes_back_is_told_again_what_it_may_have_missed() -> None:
    """An order lost with a stream needs no second copy: registering again brings it."""
    world = ready()
    world.kill(Member("expert-1", 1))
    world.run(1)
    (survivors,) = [send.body.placement for send in world.sent(Prepare)[-1:]]
    expert = world.one("expert-0")
    world.report(expert, Register(Role.EXPERT, expert.pid, "here", "cpu", "@expert-0", EpochId(1, 1)))
    assert (world.sent(Prepare)[-1].to, world.sent(Prepare)[-1].body.placement) == (expert.member, survivors)


def test_new_term_retires_nothing_before_all_who_may_live_have_left_it() -> None:
    """An attention worker that is slow to come back still uses the last term's epoch (asserted by the world)."""
    world = ready()
    world.freeze(Member("attention-1", 1), 15)
    world.restart_controller()
    world.run(14)
    assert not [send for send in world.sent(Retire) if send.body.epoch.term == 2]
    world.run(10)
    assert [send.body.epoch for send in world.sent(Retire)][-1] == EpochId(2, 0)
    assert world.controller.phase is Phase.READY


def test_new_term_keeps_every_process_and_retires_the_old_terms_epoch() -> None:
    """A restarted controller starts nobody twice, and its first epoch replaces the one of the term before."""
    world = ready()
    pids = sorted(p.pid for p in world.processes.values())
    world.restart_controller()
    world.run(20)
    assert sorted(p.pid for p in world.processes.values()) == pids
    assert world.controller.epochs.published.epoch == EpochId(2, 1)
    assert world.controller.phase is Phase.READY
    assert all(list(p.held) == [EpochId(2, 1)] for p in world.live(Role.EXPERT))


def test_new_term_replaces_who_died_while_nobody_looked() -> None:
    world = ready()
    world.processes[Member("attention-0", 1)].is_alive = False
    world.restart_controller()
    world.run(20)
    assert world.one("attention-0").member == Member("attention-0", 2)
    assert world.controller.phase is Phase.READY


def test_hung_scheduler_is_killed_but_not_for_a_short_freeze() -> None:
    world = ready()
    scheduler = world.one("scheduler").member
    world.freeze(scheduler, 10)
    world.run(20)
    assert not world.ordered(KillWorker)
    world.freeze(scheduler, 1000)
    world.run(60)
    assert [c.member for c in world.ordered(KillWorker)] == [scheduler]


def test_stop_drains_gateways_first_and_restarts_nobody() -> None:
    world = ready()
    world.tell(StopAll())
    assert {send.to.id for send in world.sent(Exit)} == {"gateway-0"}
    assert world.controller.phase is Phase.DRAINING
    world.run(5)
    assert world.controller.phase is Phase.STOPPED
    assert not any(p.is_alive for p in world.processes.values())
    assert len(world.ordered(StartWorker)) == 5


def test_stop_does_not_wait_for_ever_for_a_gateway_that_will_not_end() -> None:
    world = ready()
    world.freeze(world.one("gateway-0").member, 1000)
    world.tell(StopAll())
    world.run(TWO_BY_THREE.drain_timeout_s - 1)
    assert world.controller.phase is Phase.DRAINING
    world.run(TWO_BY_THREE.stop_timeout_s + 2)
    assert world.controller.phase is Phase.STOPPED


def test_status_names_what_scripts_rely_on() -> None:
    document = overview(ready().controller, {"model": "m"}, 20.0)
    promised = {"id", "role", "pid", "node", "state", "device", "incarnation", "bytes_loaded", "slots"}
    assert len(document["workers"]) == 5
    for worker in document["workers"]:
        assert promised <= worker.keys()
        assert worker["role"] in ("attention", "expert")
        assert (worker["slots"] > 0) == (worker["role"] == "expert")
    assert (document["model"], document["phase"], document["term"]) == ("m", "ready", 1)
    assert document["scheduler"]["id"] == "scheduler"
    assert [gateway["id"] for gateway in document["gateways"]] == ["gateway-0"]


@pytest.mark.parametrize("seed", range(12))
def test_random_faults_break_nothing_and_heal(seed: int) -> None:
    """Safety (asserted by the world at every command) under faults; then, without faults, all is well again."""
    rng = random.Random(seed)
    patience = Patience(restarts_max=999)
    config = ControllerConfig(rng.randint(1, 3), rng.randint(2, 4), rng.randint(1, 2), patience=patience)
    world = World(config, seed)
    for _ in range(30):
        world.run(rng.uniform(0, 6))
        workers = [process.member for role in WORKER_ROLES for process in world.live(role)]
        match rng.choice(("kill", "kill", "freeze", "pause", "restart", "peer")):
            case "kill" if workers:
                world.kill(rng.choice(workers))
            case "freeze" if workers:
                world.freeze(rng.choice(workers), rng.uniform(1, 20))
            case "pause":
                world.pause_controller(rng.uniform(1, 15))
            case "restart":
                world.restart_controller()
            case "peer" if world.live(Role.ATTENTION) and world.live(Role.EXPERT):
                seen = rng.choice(world.live(Role.EXPERT)).member
                world.report(rng.choice(world.live(Role.ATTENTION)), PeerLost(seen))
    world.run(120)
    controller = world.controller
    assert controller.phase is Phase.READY, overview(controller, {}, world.now_s)
    published = controller.epochs.published
    published.validate()
    assert {p.epoch for p in world.live(Role.ATTENTION)} == {published.epoch}
    assert all(list(p.held) == [published.epoch] for p in world.live(Role.EXPERT))
    assert len(controller.roster.failures) <= 64


@pytest.mark.parametrize("change", list(Change))
@pytest.mark.parametrize("before", list(WorkerState))
def test_a_change_is_in_the_table_or_refused_by_name(before: WorkerState, change: Change) -> None:
    if (before, change) in TRANSITIONS:
        assert after(before, change) is TRANSITIONS[before, change]
        return
    with pytest.raises(IllegalChange, match=f"{before.value} cannot {change.value}"):
        after(before, change)

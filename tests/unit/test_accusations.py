"""Links that break: who is lost for it, the accused, the accuser, or nobody."""

from __future__ import annotations

import pytest

from cluster.controller import ControllerConfig, Phase
from cluster.events import KillWorker, Left
from router.membership import PeerLost
from router.placement import Member
from tests.unit.controller_world import NO_SPARES, TWO_BY_THREE, World, ready

EXPERTS = [Member(f"expert-{i}", 1) for i in range(3)]
DEADLINE_S = TWO_BY_THREE.patience.member_deadline_s
DOUBT_S = TWO_BY_THREE.patience.doubt_s
TICKS_S = 1.1  # two: what the clock decides is decided within one


def killed(world: World) -> list[Member]:
    return [command.member for command in world.ordered(KillWorker)]


def accuse(world: World, observer: str, *accused: Member) -> None:
    for member in accused:
        world.report(world.one(observer), PeerLost(member))


@pytest.mark.parametrize("is_left_first", [False, True])
def test_a_broken_link_and_a_closed_stream_are_a_death(is_left_first: bool) -> None:
    """As `kill -9` looks like, whichever is heard first; nothing is waited for."""
    world = ready()
    said = [lambda: world.tell(Left(EXPERTS[0])), lambda: accuse(world, "attention-0", EXPERTS[0])]
    for say in said if is_left_first else reversed(said):
        assert not killed(world)
        say()
    assert killed(world) == [EXPERTS[0]]


def test_two_observers_that_agree_are_believed_at_once() -> None:
    world = ready()
    accuse(world, "attention-0", EXPERTS[0])
    accuse(world, "attention-0", EXPERTS[0])
    assert not killed(world)
    accuse(world, "attention-1", EXPERTS[0])
    assert killed(world) == [EXPERTS[0]]
    accuse(world, "attention-1", EXPERTS[0])
    world.run(30)
    assert killed(world) == [EXPERTS[0]]
    assert world.controller.phase is Phase.READY


def test_silence_confirms_before_it_would_be_a_loss_by_itself() -> None:
    """A frozen process: its links fall silent for who waits for it, its heartbeats for the controller."""
    world = ready()
    world.freeze(EXPERTS[1], 1000)
    world.run(DOUBT_S)
    accuse(world, "attention-1", EXPERTS[1])
    world.run(TICKS_S)
    assert killed(world) == [EXPERTS[1]]
    assert "silent" in world.ordered(KillWorker)[0].reason


def test_who_alone_reports_most_of_the_pool_is_lost_and_nobody_else() -> None:
    world = ready()
    accuse(world, "attention-0", *EXPERTS)
    world.run(DOUBT_S - TICKS_S / 2)
    assert not killed(world)
    world.run(TICKS_S * 2)
    assert killed(world) == [Member("attention-0", 1)]
    assert "3 of 3" in world.ordered(KillWorker)[0].reason
    world.run(30)
    assert killed(world) == [Member("attention-0", 1)]
    assert world.controller.phase is Phase.READY


def test_who_alone_reports_one_that_lives_is_lost_in_the_end() -> None:
    """One broken pair: the accused serves the others, and goes on."""
    world = ready()
    accuse(world, "attention-1", EXPERTS[2])
    world.run(DEADLINE_S - TICKS_S / 2)
    assert not killed(world)
    world.run(TICKS_S)
    assert killed(world) == [Member("attention-1", 1)]


def test_a_successor_that_reports_the_same_is_believed() -> None:
    """Its elder was right: they are lost now, and it is not."""
    world = ready()
    accuse(world, "attention-0", *EXPERTS)
    world.run(20)
    assert killed(world) == [Member("attention-0", 1)]
    accuse(world, "attention-0", *EXPERTS)
    assert killed(world)[1:] == EXPERTS
    world.run(60)
    assert killed(world)[1:] == EXPERTS
    assert world.controller.phase is Phase.READY


def test_the_only_observer_is_believed_of_one_but_not_of_all() -> None:
    world = ready(NO_SPARES)
    accuse(world, "attention-0", EXPERTS[1])
    world.run(DOUBT_S + TICKS_S)
    assert killed(world) == [EXPERTS[1]]
    world = ready(NO_SPARES)
    accuse(world, "attention-0", *EXPERTS[:2])
    world.run(DOUBT_S + TICKS_S)
    assert killed(world) == [Member("attention-0", 1)]


def test_the_only_expert_worker_can_be_lost() -> None:
    world = ready(ControllerConfig(attention_workers=1, expert_workers=1))
    accuse(world, "attention-0", EXPERTS[0])
    world.run(DOUBT_S + TICKS_S)
    assert killed(world) == [EXPERTS[0]]


def test_nobody_is_due_when_the_controller_did_not_look() -> None:
    """It stood still itself: what was said before counts from now on."""
    world = ready()
    accuse(world, "attention-0", EXPERTS[0])
    world.pause_controller(60)
    world.run(60)
    assert not killed(world)


def test_what_is_said_of_an_earlier_life_is_nothing() -> None:
    world = ready()
    world.kill(EXPERTS[0])
    world.run(30)
    accuse(world, "attention-0", EXPERTS[0])
    accuse(world, "attention-1", EXPERTS[0])
    world.run(30)
    assert killed(world) == [EXPERTS[0]]
    assert world.one("expert-0").member.incarnation == 2

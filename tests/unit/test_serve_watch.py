"""What `serve` tells while it watches: each failure once, however many there have been."""

from __future__ import annotations

from typing import Any

from cluster.controller import ControllerConfig
from cluster.events import Role
from cluster.overview import overview
from cluster.roster import FAILURES_REMEMBERED_MAX, Patience
from cluster.serve import Told, must_tell_to_drain
from tests.unit.controller_world import World


def status(world: World) -> dict[str, Any]:
    return overview(world.controller, {}, world.now_s)


def test_failures_are_told_also_beyond_those_that_are_remembered() -> None:
    world = World(ControllerConfig(1, 2, 2, patience=Patience(backoff_s_max=0.5)))
    world.run(20)
    told, lines = Told.by(status(world)), []
    for number in range(FAILURES_REMEMBERED_MAX + 9):
        world.kill(world.live(Role.EXPERT)[0].member, f"death {number}")
        world.run(10)
        lines += told.news(status(world))
        told = Told.by(status(world))
    assert [line.partition("death ")[2] for line in lines] == [str(n) for n in range(FAILURES_REMEMBERED_MAX + 9)]
    assert told.news(status(world)) == []


def test_a_new_term_counts_anew_and_what_was_missed_is_said() -> None:
    failure = {"id": "expert-0", "incarnation": 7, "reason": "killed"}
    told = Told.by({"term": 1, "failures": [failure | {"number": 12}]})
    assert told.news({"term": 2, "failures": [failure | {"number": 1}]}) == ["expert-0#7 is lost: killed"]
    assert told.news({"term": 1, "failures": [failure | {"number": 15}]}) == [
        "2 more were lost meanwhile", "expert-0#7 is lost: killed",
    ]  # fmt: skip
    assert Told.by(None).news({"term": 1, "failures": []}) == []


def test_a_controller_that_has_begun_anew_is_told_to_drain_once_it_has_heard_from_its_gateways() -> None:
    """One that knows of no gateway takes all for drained."""
    anew = {"phase": "starting", "gateways": [], "uptime_s": 0.1}
    assert not must_tell_to_drain(anew)
    assert must_tell_to_drain(anew | {"gateways": [{"id": "gateway-0"}]})
    assert must_tell_to_drain(anew | {"uptime_s": 60.0})  # there is none
    assert not must_tell_to_drain(anew | {"phase": "draining", "gateways": [{"id": "gateway-0"}]})

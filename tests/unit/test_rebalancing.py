"""From a worker's count to a new placement: by the controller's own way, over every door."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import httpx
import pytest
import torch
from expertmesh.v1 import admin_pb2 as pb

from cluster.balancer.config import BalancerConfig
from cluster.cli import main
from cluster.controller import Phase
from cluster.events import Prepare, Publish, Rebalance, Role
from cluster.overview import overview, rebalancing
from expert_workers.pace import Pace
from expert_workers.tally import Tally
from gateway.model_card import ModelCard
from gateway.server import create_app
from router.membership import ExpertLoad, Health, HealthState
from router.placement import EpochId, Placement
from tests.unit.controller_world import NO_SPARES, World, ready
from tests.unit.gateway_world import card_of, state_of, write_checkpoint
from tests.unit.grpc_world import facing

CONFIG = replace(NO_SPARES, balancer=BalancerConfig(spare_slots=1))


def loaded_world() -> World:
    """Two expert workers that share two layers of six experts; of each layer, one expert has half of the load."""
    world = ready(CONFIG)
    holders = world.controller.epochs.published.holder_table[:, :, 0]
    reads = [[50 if expert == layer else 10 for expert in range(6)] for layer in range(2)]
    for base in (0, 1):  # what is counted first was before our time
        for index in range(2):
            mine = [divmod(slot, 6) for slot in range(12) if holders.reshape(-1)[slot] == index]
            slots = tuple(layer * 6 + expert for layer, expert in mine)
            counts = tuple(1 + base * reads[layer][expert] for layer, expert in mine)
            load = ExpertLoad(slots, counts, tuple(0 for _ in mine))
            world.report(world.one(f"expert-{index}"), Health(HealthState.READY, load=load))
    return world


def test_what_workers_counted_is_the_imbalance_in_the_status() -> None:
    told = overview(loaded_world().controller, {}, 20.0)["balance"]
    assert told["imbalance"] == pytest.approx(70 / 50)
    assert sum(told["loads"].values()) == pytest.approx(200)
    assert told["preparing"] is None


def test_rebalancing_is_an_epoch_like_any_other() -> None:
    """Prepared beside the work, at a bounded rate, by those who hold it; then published."""
    world = loaded_world()
    before = world.controller.epochs.published
    proposal = world.controller.rebalancing().propose()
    assert proposal.imbalance_before == pytest.approx(70 / 50)
    assert proposal.imbalance_after < 1.1
    world.tell(Rebalance(proposal))
    ordered = [send.body for send in world.sent(Prepare)[-2:]]
    assert all(order.unhurried for order in ordered)
    assert {order.placement.epoch for order in ordered} == {EpochId(1, before.epoch.number + 1)}
    assert world.controller.rebalancing() is None, "one after the other"
    document = rebalancing(world.controller, proposal, ordered[0].placement.epoch)
    assert json.loads(json.dumps(document))["moves"]
    world.run(20)
    assert world.sent(Publish)[-1].body.placement.workers == proposal.after.workers
    assert world.controller.phase is Phase.READY
    assert world.controller.rebalancing().propose().is_empty, "what has just been balanced stays"
    told = overview(world.controller, {}, world.now_s)["balance"]
    assert told["imbalance"] is None, "a new placement is judged by what comes after it"


def test_a_proposal_for_a_placement_that_is_gone_changes_nothing() -> None:
    """It was worked out while a worker was lost."""
    world = loaded_world()
    proposal = world.controller.rebalancing().propose()
    world.kill(world.one("expert-1").member)
    world.run(20)
    published = world.controller.epochs.published
    assert published.epoch > proposal.before.epoch
    world.tell(Rebalance(proposal))
    assert world.controller.epochs.preparing is None
    assert world.controller.epochs.published == published


def test_a_worker_lost_while_a_rebalancing_is_prepared_ends_it() -> None:
    world = loaded_world()
    proposal = world.controller.rebalancing().propose()
    world.tell(Rebalance(proposal))
    world.kill(world.one("expert-0").member)
    world.run(30)
    published: Placement = world.controller.epochs.published
    published.validate()
    assert world.controller.phase is Phase.READY
    assert {worker.member for worker in published.workers} == {p.member for p in world.live(Role.EXPERT)}


def test_while_a_worker_is_away_there_is_nothing_to_rebalance() -> None:
    """Its experts are loaded by its next life, and by nobody else meanwhile; all may be away."""
    world = loaded_world()
    for name in ("expert-0", "expert-1"):
        world.kill(world.one(name).member)
        world.run(0.1)
        assert world.controller.rebalancing() is None
    world.run(30)
    assert world.controller.rebalancing() is not None


def test_what_waits_for_lost_experts_is_never_loaded_at_a_bounded_rate() -> None:
    world = ready(NO_SPARES)
    world.kill(world.one("expert-0").member)
    world.run(20)
    assert len(world.sent(Prepare)) == 4
    assert not any(send.body.unhurried for send in world.sent(Prepare))


# Counting and loading, at the worker.


def test_a_tally_counts_computations_and_rows() -> None:
    tally = Tally(2, 3)
    assert tally.total() == ExpertLoad()
    tally.add(1, torch.tensor([2, 0, 2], dtype=torch.int32))
    tally.add(1, torch.tensor([2], dtype=torch.int32))
    assert tally.total() == ExpertLoad((3, 5), (1, 2), (1, 3))


def test_a_pace_keeps_to_its_rate_and_makes_up_for_nothing() -> None:
    pace = Pace(100, 10.0)
    assert pace.wait_s(50, 10.1) == pytest.approx(0.4)
    assert pace.wait_s(50, 13.0) == 0  # slower than the rate
    assert pace.wait_s(50, 13.1) == pytest.approx(0.4)
    assert Pace(0, 0.0).wait_s(1 << 40, 0.0) == 0


# Doors.


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


async def test_rest_and_grpc_say_the_same(card: ModelCard) -> None:
    state, _ = state_of(card)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client, facing(card) as face:
        document = (await client.post("/v1/admin/rebalance")).json()
        dry = (await client.post("/v1/admin/rebalance?dry_run=true")).json()
        typed = await face.admin.Rebalance(pb.RebalanceRequest())
        assert not (await face.admin.Rebalance(pb.RebalanceRequest(dry_run=True))).HasField("epoch")
        for query, named in (("dry_run=yes", 'dry_run is "yes"'), ("moves=3", 'moves is "3"')):
            refused = await client.post(f"/v1/admin/rebalance?{query}")
            assert refused.status_code == 400
            assert named in refused.json()["error"]["message"]
    assert (document["epoch"], dry["epoch"]) == ({"term": 1, "number": 2}, None)
    assert (typed.epoch.term, typed.epoch.number) == (1, 2)
    moves = [(move.layer, move.expert, move.to, getattr(move, "from")) for move in typed.moves]
    assert moves == [(3, 5, "expert-1", "expert-0"), (3, 5, "expert-1", "")]
    assert (typed.dropped, typed.bytes, typed.imbalance_before, typed.imbalance_after) == (1, 64, 1.5, 1.25)


class Gateway(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        document = self.answers.get(self.path)
        self.send_response(503 if document is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(document or {"error": {"message": "not now: wait"}}).encode())

    def log_message(self, *_: object) -> None:
        """Not into the test's output."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_command_shows_moves_and_gain(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    moves = [{"layer": 1, "expert": 7, "to": "expert-0", "from": None}]
    document = {
        "epoch": {"term": 2, "number": 5}, "moves": moves, "bytes": 1 << 20, "dropped": 0,
        "imbalance_before": 1.5, "imbalance_after": 1.05,
    }  # fmt: skip
    nothing = {**document, "epoch": None, "moves": [], "imbalance_before": None}
    Gateway.answers = {
        "/v1/admin/rebalance?dry_run=false": document,
        "/v1/admin/rebalance?dry_run=true": {**document, "epoch": None},
    }
    assert main(["rebalance", "--url", url]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "1 7 expert-0 (a further replica)",
        "1.50 of the mean load, and would have 1.05",
        "epoch 2.5 is",
    ):
        assert words in shown
    assert main(["rebalance", "--url", url, "--dry-run"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert main(["rebalance", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    Gateway.answers = {"/v1/admin/rebalance?dry_run=false": nothing}
    assert main(["rebalance", "--url", url]) == 0
    assert "nothing to go by" in capsys.readouterr().out
    assert main(["rebalance", "--url", url, "--dry-run"]) == 1
    assert "answers 503: not now: wait" in capsys.readouterr().err

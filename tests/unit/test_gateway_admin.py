"""The admin service: the status document typed, and the placement a page of layers at a time."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from expertmesh.v1 import admin_pb2 as pb
from expertmesh.v1 import control_pb2, identity_pb2

from cluster.controller import Controller, ControllerConfig, Phase
from cluster.events import Register, Report, Role, StartWorker, Tick
from cluster.lifecycle import WorkerState
from cluster.overview import DRAINING, overview
from cluster.wire import encode_placement
from gateway.admin_wire import PHASES, STATES, placement_page
from gateway.errors import BadRequest, NotReady
from gateway.model_card import ModelCard
from router.membership import Health, HealthState
from router.placement import EpochId, Member, spread
from tests.unit.controller_world import SHAPE
from tests.unit.gateway_world import card_of, write_checkpoint
from tests.unit.grpc_world import details_of, facing, failure


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def table(num_layers: int = 5, number: int = 3) -> control_pb2.PlacementTable:
    """Five experts of each layer on three workers, each twice."""
    members = [(Member(f"expert-{i}", i + 1), "") for i in range(3)]
    return encode_placement(spread(EpochId(2, number), "f00d", members, num_layers, 5, 2)).table


def document() -> dict[str, Any]:
    """Of a controller to which one of three workers has come."""
    controller = Controller(ControllerConfig(), 4, SHAPE, {}, 0.0)
    started = [c.member for c in controller.step(Tick(), 0.0) if isinstance(c, StartWorker)]
    expert = next(member for member in started if member.id == "expert-1")
    for body in (
        Register(Role.EXPERT, 42, "node", "cpu", "at"),
        Health(HealthState.LOADING, 7, 9, "reads", {}, 6, "fp8"),
    ):
        controller.step(Report(expert, SHAPE.fingerprint, 4, body), 1.0)
    return overview(controller, {"model": "tiny"}, 2.0)


async def test_status_is_the_document_typed(card: ModelCard) -> None:
    said = document()

    async def status() -> dict[str, Any]:
        return said

    async with facing(card) as face:
        face.state.status = status
        answer = await face.admin.GetStatus(pb.GetStatusRequest())
        pools = await face.admin.ListPools(pb.ListPoolsRequest())
    assert (answer.model, answer.term, answer.phase) == ("tiny", 4, pb.CLUSTER_PHASE_STARTING)
    assert not answer.HasField("epoch")
    assert [worker.id for worker in answer.workers] == ["attention-0", "expert-0", "expert-1"]
    assert answer.workers[2] == pb.Worker(
        id="expert-1", role=identity_pb2.ROLE_EXPERT, pid=42, node="node", state=pb.WORKER_STATE_LOADING,
        device="cpu", incarnation=1, bytes_loaded=7, bytes_total=9, detail="reads",
        bytes_kept=6, kept_as="fp8",
    )  # fmt: skip
    assert answer.workers[0].state == pb.WORKER_STATE_STARTING
    assert list(pools.pools) == list(answer.pools)
    assert [(p.role, p.workers_wanted, p.workers_ready, p.bytes_loaded) for p in pools.pools] == [
        (identity_pb2.ROLE_ATTENTION, 1, 0, 0), (identity_pb2.ROLE_EXPERT, 2, 0, 7)
    ]  # fmt: skip


def test_every_word_of_the_document_has_a_name() -> None:
    assert set(STATES) == {state.value for state in WorkerState} | {DRAINING, "unspecified"}
    assert set(PHASES) == {phase.value for phase in Phase} | {"unspecified"}


async def test_pages_make_up_the_whole_placement(card: ModelCard) -> None:
    placed, pages, token = table(), [], ""
    async with facing(card) as face:
        face.placement = placed
        while not pages or token:
            page = await face.admin.GetPlacement(pb.GetPlacementRequest(page_size=2, page_token=token))
            pages.append(page)
            token = page.next_page_token
    assert [[layer.layer for layer in page.layers] for page in pages] == [[0, 1], [2, 3], [4]]
    found = {
        (page.workers[holding.worker].id, layer.layer * placed.num_experts + expert)
        for page in pages
        for layer in page.layers
        for holding in layer.holdings
        for expert in holding.experts
    }
    assert found == {(worker.worker.id, slot) for worker in placed.workers for slot in worker.experts}
    assert {(page.epoch.term, page.epoch.number, page.num_layers) for page in pages} == {(2, 3, 5)}


def test_pages_are_bounded_and_belong_to_one_epoch() -> None:
    assert len(placement_page(table(200), 64, "").layers) == 64
    token = placement_page(table(), 2, "").next_page_token
    assert placement_page(table(), 2, token).layers[0].layer == 2
    for wrong in ("x", "2.3.", "2.3.-1", "2.3.99999999999999"):
        with pytest.raises(BadRequest, match=r"page_token is .*; accepted: the next_page_token of a page"):
            placement_page(table(), 2, wrong)
    with pytest.raises(BadRequest, match=r"of epoch 2\.4"):
        placement_page(table(number=4), 2, token)
    assert not placement_page(table(), 2, "2.3.4000").layers


async def test_what_cannot_be_answered_has_a_status(card: ModelCard) -> None:
    async def unreachable() -> dict[str, Any]:
        raise NotReady("the controller cannot be reached (UNAVAILABLE)", retry_after_s=1)

    async with facing(card) as face:
        face.state.status = unreachable
        away = await failure(face.admin.GetStatus(pb.GetStatusRequest()))
        early = await failure(face.admin.GetPlacement(pb.GetPlacementRequest()))
        wide = await failure(face.admin.GetPlacement(pb.GetPlacementRequest(page_size=65)))
    assert away.code() == early.code() == grpc.StatusCode.UNAVAILABLE
    assert early.details() == "no placement is published yet"
    assert wide.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(wide)["BadRequest"].field_violations[0].field == "page_size"

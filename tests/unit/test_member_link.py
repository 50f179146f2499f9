"""The stream between a process and the controller, over a real abstract socket: what is said arrives, whatever
breaks in between."""

from __future__ import annotations

import asyncio
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import wire
from cluster.controller import Controller, ControllerConfig
from cluster.controller_server import ControllerServer
from cluster.events import (
    Exit,
    Members,
    Order,
    OrderBody,
    Prepare,
    Publish,
    Register,
    Report,
    ReportBody,
    Retire,
    Role,
    SendTrace,
)
from cluster.member_link import ControllerUnreachable, MemberLink, ask_rebalance, fetch_placement, fetch_status
from router.membership import Adopted, ExpertLoad, Health, HealthState, PeerLost, Prepared, Traced, Unprepared
from router.placement import EpochId, Member, spread
from tests.unit.served_controller import SHAPE, WAIT_S, Cluster, ListedStarts


class Process:
    """A member that writes down its orders."""

    def __init__(
        self, cluster: Cluster, role: Role, member: Member, token: str = "token", pid: int = 1, node: str = "here"
    ) -> None:
        self.orders: queue.Queue[OrderBody] = queue.Queue()
        self.epoch: EpochId | None = None
        self.link = MemberLink(
            cluster.address, token, member, "f00d",
            lambda: Register(role, pid, node, "cpu", f"@{member.id}", self.epoch),
            lambda: Health(HealthState.READY, 5, 5, "", {"rows": 3.0}, 9, "fp8"),
            self.orders.put, heartbeat_s=0.05,
        )  # fmt: skip
        self.link.start()

    def ordered(self, kind: type) -> OrderBody:
        while True:
            order = self.orders.get(timeout=WAIT_S)
            if isinstance(order, kind):
                return order


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def join(cluster: Cluster) -> Iterator[object]:
    processes: list[Process] = []

    def joined(role: Role, member: Member, **other: object) -> Process:
        processes.append(Process(cluster, role, member, **other))
        return processes[-1]

    yield joined
    for process in processes:
        process.link.close(WAIT_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "member-link"]


def document(cluster: Cluster) -> dict[str, object]:
    return cluster.thread.call(fetch_status(cluster.address, "token", WAIT_S), WAIT_S)


def serve_one_epoch(cluster: Cluster, join: object) -> tuple[Process, Process]:
    started = {cluster.driver.started.get(timeout=WAIT_S).id for _ in range(2)}
    assert started == {"attention-0", "expert-0"}
    expert = join(Role.EXPERT, Member("expert-0", 1))
    attention = join(Role.ATTENTION, Member("attention-0", 1))
    placement = expert.ordered(Prepare).placement
    expert.epoch = placement.epoch
    expert.link.report(Prepared(placement.epoch))
    assert attention.ordered(Publish).placement == placement
    attention.epoch = placement.epoch
    attention.link.report(Adopted(placement.epoch))
    assert expert.ordered(Retire).epoch == EpochId(placement.epoch.term, placement.epoch.number - 1)
    return attention, expert


def test_epoch_is_prepared_published_adopted_over_the_wire(cluster: Cluster, join: object) -> None:
    """From registration to the first epoch, and all of it in the status document."""
    serve_one_epoch(cluster, join)
    told, deadline_s = document(cluster), time.monotonic() + WAIT_S
    while not all(worker["bytes_loaded"] for worker in told["workers"]):
        assert time.monotonic() < deadline_s, "the heartbeats behind the reports never came"
        told = document(cluster)
    assert [(w["id"], w["state"], w["bytes_loaded"]) for w in told["workers"]] == [
        ("attention-0", "ready", 5), ("expert-0", "ready", 5),
    ]  # fmt: skip
    assert {(w["bytes_kept"], w["kept_as"]) for w in told["workers"]} == {(9, "fp8")}
    assert (told["model"], told["epoch"]) == ("m", {"term": 1, "number": 1})


def test_link_finds_a_restarted_controller_by_itself(cluster: Cluster, join: object) -> None:
    """The new term starts nobody: those who lived registered again, with the epoch they use."""
    attention, expert = serve_one_epoch(cluster, join)
    cluster.incarnations = {"attention-0": 1, "expert-0": 1}
    cluster.driver.are_gone = False
    cluster.restart()
    placement = expert.ordered(Prepare).placement
    assert placement.epoch == EpochId(2, 1)
    expert.link.report(Prepared(placement.epoch))
    assert attention.ordered(Publish).placement.epoch == EpochId(2, 1)
    assert attention.link.term == 2
    assert cluster.driver.started.empty()


def test_a_process_that_ends_on_this_node_is_replaced_at_once(cluster: Cluster, join: object) -> None:
    """Its stream closes and the kernel knows it no more: neither Ray nor a deadline is waited for. A stream alone
    that closes says nothing."""
    assert {cluster.driver.started.get(timeout=WAIT_S).id for _ in range(2)} == {"attention-0", "expert-0"}
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    with child.stdin:
        here = {"node": platform.node()}
        processes = (
            join(Role.ATTENTION, Member("attention-0", 1), pid=os.getpid(), **here),
            join(Role.EXPERT, Member("expert-0", 1), pid=child.pid, **here),
        )
        deadline_s = time.monotonic() + WAIT_S
        while not all(worker["pid"] for worker in document(cluster)["workers"]):
            assert time.monotonic() < deadline_s
        child.kill()
        for process in processes:
            process.link.close(WAIT_S)
        assert cluster.driver.started.get(timeout=WAIT_S) == Member("expert-0", 2)
        assert cluster.driver.reasons == {Member("expert-0", 1): "its process has ended"}
        assert child.wait() == -9


def test_worker_of_an_older_life_is_told_to_exit(cluster: Cluster, join: object) -> None:
    serve_one_epoch(cluster, join)
    ghost = join(Role.EXPERT, Member("expert-0", 99))
    assert "expert-0#99" in ghost.ordered(Exit).reason


def test_scheduler_is_told_the_members(join: object) -> None:
    scheduler = join(Role.SCHEDULER, Member("scheduler", 1))
    while scheduler.ordered(Members).attention != (Member("attention-0", 1),):
        pass


def test_placement_is_told_once_it_is_published(cluster: Cluster, join: object) -> None:
    def told() -> object:
        return cluster.thread.call(fetch_placement(cluster.address, "token", WAIT_S), WAIT_S)

    assert told() is None
    _, expert = serve_one_epoch(cluster, join)
    table = told()
    assert EpochId(table.epoch.term, table.epoch.number) == expert.epoch
    assert [worker.worker.id for worker in table.workers] == ["expert-0"]


def test_rebalancing_is_asked_over_the_wire_once_a_placement_is_in_use(cluster: Cluster, join: object) -> None:
    def asked(dry_run: bool) -> dict[str, object]:
        return cluster.thread.call(ask_rebalance(cluster.address, "token", WAIT_S, dry_run), WAIT_S)

    with pytest.raises(
        ControllerUnreachable, match="not now: a placement is being prepared, a worker is away, or none is in use"
    ):
        asked(dry_run=True)
    serve_one_epoch(cluster, join)
    for dry_run in (True, False):  # one worker has nobody to share with
        assert asked(dry_run) == {
            "epoch": None, "moves": [], "dropped": 0, "bytes": 0, "imbalance_before": None,
            "imbalance_after": None,
        }  # fmt: skip


def test_lost_peer_is_killed_and_started_again(cluster: Cluster, join: object) -> None:
    attention, _ = serve_one_epoch(cluster, join)
    attention.link.report(PeerLost(Member("expert-0", 1)))
    assert cluster.driver.killed.get(timeout=WAIT_S) == Member("expert-0", 1)
    assert cluster.driver.started.get(timeout=WAIT_S) == Member("expert-0", 2)


def test_stranger_without_the_token_is_not_heard(cluster: Cluster, join: object) -> None:
    join(Role.SCHEDULER, Member("scheduler", 1), token="guess")
    with pytest.raises(ControllerUnreachable, match="UNAUTHENTICATED"):
        cluster.thread.call(fetch_status(cluster.address, "guess", WAIT_S), WAIT_S)
    assert document(cluster)["scheduler"] is None


def test_order_of_an_older_term_is_refused(cluster: Cluster, join: object) -> None:
    """A controller that was only frozen comes back with an older term: nobody obeys."""
    _, expert = serve_one_epoch(cluster, join)
    expert.link.term = 9
    expert.link.close(WAIT_S)
    stale = wire.encode_order(Order(3, "f00d", Exit("you are lost")))
    expert.link._obey(stale)
    assert expert.orders.empty()
    assert expert.link.orders_refused == 1


def test_absent_controller_is_named_so(cluster: Cluster) -> None:
    absent = "unix-abstract:expertmesh-test-nobody"
    with pytest.raises(ControllerUnreachable, match="UNAVAILABLE"):
        cluster.thread.call(fetch_status(absent, "token", WAIT_S), WAIT_S)


def test_second_server_on_one_address_is_an_error(cluster: Cluster) -> None:
    second = Controller(ControllerConfig(), 2, SHAPE, {}, 0.0)

    async def serve_again() -> None:
        server = ControllerServer(second, ListedStarts(), "token", {}, tick_s=1)
        try:
            await server.start(cluster.address)
        finally:
            await server.stop()

    with pytest.raises(OSError, match="cannot be bound"):
        asyncio.run_coroutine_threadsafe(serve_again(), cluster.thread.loop).result(WAIT_S)


names = st.text(min_size=1, max_size=8)
members = st.builds(Member, names, st.integers(1, 2**40))
epochs = st.builds(EpochId, st.integers(0, 2**40), st.integers(0, 2**40))
loads = st.lists(st.tuples(st.integers(0, 2**31), *[st.integers(0, 2**60)] * 2), min_size=1, max_size=3).map(
    lambda entries: ExpertLoad(*zip(*entries, strict=True))
)
healths = st.builds(
    Health, st.sampled_from(HealthState), st.integers(0, 2**60), st.integers(0, 2**60), names,
    st.dictionaries(names, st.floats(allow_nan=False), max_size=3), load=loads,
)  # fmt: skip
registers = st.builds(
    Register, st.sampled_from(Role), st.integers(0, 2**31), names, names, names, st.none() | epochs,
)  # fmt: skip
said = st.builds(Prepared, epochs) | st.builds(Adopted, epochs) | st.builds(PeerLost, members)
said |= st.builds(Unprepared, epochs, names)
said |= st.builds(Traced, st.integers(0, 2**60), st.binary(max_size=9))
bodies = registers | healths | said


@given(members, names, st.integers(0, 2**60), bodies)
def test_reports_survive_the_wire(sender: Member, fingerprint: str, term: int, body: ReportBody) -> None:
    report = Report(sender, fingerprint, term, body)
    assert wire.decode_report(wire.encode_report(report)) == report


placements = st.builds(
    lambda epoch, ids, layers, experts: spread(
        epoch, "f00d", [(Member(name, 1), f"@{name}") for name in ids], layers, experts, len(ids)
    ),
    epochs, st.lists(names, min_size=1, max_size=3, unique=True), st.integers(1, 3), st.integers(1, 5),
)  # fmt: skip
orders = (
    st.builds(Prepare, placements, st.booleans()) | st.builds(Publish, placements) | st.builds(Retire, epochs)
    | st.builds(Exit, st.text()) | st.builds(Members, st.lists(members).map(tuple))
    | st.builds(SendTrace, st.integers(0, 2**60), st.floats(0, 60), st.integers(0, 2**60))
)  # fmt: skip


@given(st.integers(0, 2**60), names, orders)
def test_orders_survive_the_wire(term: int, fingerprint: str, body: OrderBody) -> None:
    order = Order(term, fingerprint, body)
    assert wire.decode_order(wire.encode_order(order)) == order


def test_messages_that_cannot_be_are_refused_by_field() -> None:
    sender = Member("expert-0", 1)
    empty = wire.encode_report(Report(sender, "f", 1, Prepared(EpochId(1, 1))))
    empty.ClearField("prepared")
    with pytest.raises(wire.Malformed, match="body None"):
        wire.decode_report(empty)
    nobody = wire.encode_report(Report(Member("", 0), "f", 1, Prepared(EpochId(1, 1))))
    with pytest.raises(wire.Malformed, match="incarnation"):
        wire.decode_report(nobody)
    uneven = wire.encode_report(
        Report(sender, "f", 1, Health(HealthState.READY, load=ExpertLoad((1,), (2,), (3,))))
    )
    uneven.heartbeat.load.rows.append(4)
    with pytest.raises(wire.Malformed, match="1 slots, 1 reads, 2 rows; accepted: as many of each"):
        wire.decode_report(uneven)
    placement = spread(EpochId(1, 1), "f", [(sender, "@")], 1, 2, 1)
    beyond = wire.encode_order(Order(1, "f", Prepare(placement)))
    beyond.prepare.workers[0].experts[0] = 2
    with pytest.raises(wire.Malformed, match=r"worker 'expert-0': holds \(layer 1, expert 0\); layers are 0 to 0"):
        wire.decode_order(beyond)

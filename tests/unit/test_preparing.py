"""Adopting a placement never holds up a step: handshakes happen elsewhere, and the newest placement wins."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from attention_workers.preparing import Preparing
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import PlacementError
from router.placement import EpochId, Member, PlacedWorker, Placement
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_link_suite import assert_nothing_left, footprint
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, ExpertThread, answer, identity
from tests.unit.test_dispatcher import NUM_EXPERTS, NUM_LAYERS, batch, direct

EVERY = tuple((layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS))


class Stage:
    """A dispatcher whose placements are prepared in the background, over real sockets."""

    def __init__(self, stack: ExitStack, kind: str, config: RouterConfig) -> None:
        self.kind, self.stack = kind, stack
        self.lost: list[Member] = []
        self.prepared: queue.Queue[bool] = queue.Queue(16)
        self.failures: queue.Queue[str] = queue.Queue(16)
        me = identity()
        self.dispatcher = Dispatcher(attention_end(kind, me, config), me.member, config, self.lost.append)
        stack.callback(self.dispatcher.close)
        self.preparing = Preparing(self.dispatcher.prepare, lambda: self.prepared.put(True), self.failures.put)
        self.preparing.start()
        stack.callback(self.preparing.close, PATIENCE_S)

    def expert(self, name: str) -> PlacedWorker:
        who = identity(name)
        end = expert_end(self.kind, who, CONFIG)
        expert = self.stack.enter_context(ExpertThread(end, who, answer))
        return PlacedWorker(expert.member, end.address, EVERY)

    def silent(self) -> PlacedWorker:
        """Somebody listens there, and never answers."""
        if self.kind == "shm":
            door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            door.bind("\0expertmesh-test-silent")
            address = "unix-abstract:expertmesh-test-silent"
        else:
            door = socket.socket(socket.AF_INET)
            door.bind(("127.0.0.1", 0))
            address = f"grpc:127.0.0.1:{door.getsockname()[1]}"
        door.listen(8)
        self.stack.callback(door.close)
        return PlacedWorker(Member("expert-silent", 1), address, EVERY)

    def step(self) -> None:
        rows, routes = batch()
        merged = self.dispatcher.combine(self.dispatcher.dispatch(1, rows, routes))
        assert torch.equal(merged, direct(1, rows, routes))


def placement(number: int, *workers: PlacedWorker) -> Placement:
    return Placement(EpochId(1, number), "abc", NUM_LAYERS, NUM_EXPERTS, workers)


@pytest.fixture(params=["shm", "grpc"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    before = footprint()
    with ExitStack() as stack:
        yield Stage(stack, request.param, replace(CONFIG, connect_timeout_s=0.6))
    assert_nothing_left(before)


def test_steps_go_on_while_a_handshake_hangs(stage: Stage) -> None:
    """Nobody waits for a worker that listens and never answers; then the epoch is used without it."""
    well = stage.expert("expert-0")
    stage.preparing.offer(placement(1, well))
    assert stage.prepared.get(timeout=PATIENCE_S)
    assert stage.dispatcher.adopt() == EpochId(1, 1)
    began_s = time.monotonic()
    silent = stage.silent()
    stage.preparing.offer(placement(2, well, silent))
    longest_s = steps = 0.0
    while stage.prepared.empty():
        step_s = time.monotonic()
        assert stage.dispatcher.adopt() is None
        stage.step()
        longest_s, steps = max(longest_s, time.monotonic() - step_s), steps + 1
    assert time.monotonic() - began_s >= 0.5
    assert steps > 10
    assert longest_s < 0.4
    assert stage.dispatcher.adopt() == EpochId(1, 2)
    assert stage.lost == [silent.member]
    stage.step()


def test_a_placement_that_is_overtaken_leaves_no_link(stage: Stage) -> None:
    """Only the newest is adopted; who was linked for the other alone is let go, and is no loss."""
    well, brief = stage.expert("expert-0"), stage.expert("expert-1")
    for number, workers in ((1, (well,)), (2, (well, brief)), (3, (well,))):
        stage.preparing.offer(placement(number, *workers))
        assert stage.prepared.get(timeout=PATIENCE_S)
    assert stage.dispatcher.adopt() == EpochId(1, 3)
    assert stage.dispatcher.adopt() is None
    assert stage.dispatcher.transports().keys() == {well.member}
    assert stage.lost == []
    stage.step()


def test_what_waits_is_replaced_by_what_is_newer(stage: Stage) -> None:
    """Placements that came while a handshake hung are not worked off one by one."""
    well = stage.expert("expert-0")
    stage.preparing.offer(placement(1, stage.silent()))
    for number in range(2, 9):
        stage.preparing.offer(placement(number, well))
    seen = threading.Event()
    while stage.dispatcher.adopt() != EpochId(1, 8):
        seen.wait(0.01)
    assert stage.prepared.qsize() <= 2
    stage.step()


def test_a_placement_of_the_past_is_a_failure_with_its_reason(stage: Stage) -> None:
    well = stage.expert("expert-0")
    stage.preparing.offer(placement(5, well))
    assert stage.prepared.get(timeout=PATIENCE_S)
    stage.preparing.offer(placement(4, well))
    assert PlacementError.__name__ in stage.failures.get(timeout=PATIENCE_S)

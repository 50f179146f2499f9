"""A real controller, served on an abstract socket, whose driver starts nothing but writes down what it is told."""

from __future__ import annotations

import queue
import secrets
from concurrent.futures import Future

from cluster.controller import Controller, ControllerConfig
from cluster.controller_server import ControllerServer
from cluster.epochs import ModelShape
from cluster.events import ActorDied, KillWorker, Remember, StartWorker, WatchWorker
from cluster.loop_thread import LoopThread
from router.placement import Member

SHAPE = ModelShape("f00d", num_layers=2, num_experts=4)
WAIT_S = 10.0


class ListedStarts:
    """A driver whose processes are the links that the test makes."""

    def __init__(self) -> None:
        self.started: queue.Queue[Member] = queue.Queue()
        self.killed: queue.Queue[Member] = queue.Queue()
        self.remembered: list[Remember] = []
        self.num_kept = 0
        self.why_not_kept = ""
        self.reasons: dict[Member, str] = {}  # of those killed
        self.are_gone = True  # what an earlier controller started

    def bind(self, on_died: object) -> None:
        self.on_died = on_died

    def start(self, command: StartWorker) -> None:
        self.started.put(command.member)

    def watch(self, command: WatchWorker) -> None:
        if self.are_gone:
            self.on_died(ActorDied(command.member, "it is gone"))

    def remember(self, command: Remember) -> Future[None]:
        self.remembered.append(command)
        kept: Future[None] = Future()
        if self.why_not_kept:
            kept.set_exception(OSError(self.why_not_kept))
        else:
            self.num_kept += 1
            kept.set_result(None)
        return kept

    def kill(self, command: KillWorker) -> None:
        self.reasons[command.member] = command.reason
        self.killed.put(command.member)

    def close(self) -> None:
        """Nothing runs."""


class Cluster:
    """A served controller of one worker per pool, restartable under the same address."""

    def __init__(self, address: str | None = None, shape: ModelShape = SHAPE) -> None:
        self.address = address or f"unix-abstract:expertmesh-test-{secrets.token_hex(6)}"
        self.shape = shape
        self.driver = ListedStarts()
        self.thread = LoopThread("test-controller")
        self.term = 0
        self.incarnations: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        if self.term:
            self.thread.call(self.server.stop(), WAIT_S)
        self.term += 1
        config = ControllerConfig(attention_workers=1, expert_workers=1)
        controller = Controller(config, self.term, self.shape, self.incarnations, self.thread.loop.time())
        self.server = self.thread.call(self._served(controller), WAIT_S)

    async def _served(self, controller: Controller) -> ControllerServer:
        server = ControllerServer(controller, self.driver, "token", {"model": "m"}, tick_s=0.02)
        await server.start(self.address)
        return server

    def close(self) -> None:
        self.thread.call(self.server.stop(), WAIT_S)
        self.thread.close(WAIT_S)

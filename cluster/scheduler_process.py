"""The scheduler's process without Ray: its server in a loop of its own, joined to the controller.

One life is one term. A scheduler that is superseded or has failed ends its process: whoever runs it starts the
next term, and running work never notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterable

import psutil

from cluster import address
from cluster.events import Exit, Members, OrderBody, Register, Role
from cluster.loop_thread import LoopThread
from cluster.member_link import MemberLink
from cluster.processes import end_process
from cluster.scheduler.core import Scheduler
from cluster.scheduler.errors import AddressUnusable
from cluster.scheduler.events import Incarnation, MembersExpected
from cluster.scheduler.server import SchedulerServer
from cluster.spec import ClusterSpec
from cluster.watch import TurnWatch
from router.membership import Health, HealthState
from router.placement import Member

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0


class SchedulerProcess:
    def __init__(self, spec: ClusterSpec, term: int) -> None:
        self._address = spec.scheduler_address
        self._state = HealthState.STARTING
        self._thread = LoopThread("scheduler")
        self._spec, self._term = spec, term
        self._server: SchedulerServer | None = None
        self._watch = TurnWatch({"loop": spec.config.cluster.loop_stall_s})
        self._controller: psutil.Process | None = None  # until it is found hung; None: not heard, or not here
        self._heard = 0  # words of any controller
        self._link = MemberLink(
            spec.controller_address,
            spec.token,
            Member("scheduler", term),
            spec.facts.fingerprint,
            lambda: Register(Role.SCHEDULER, os.getpid(), platform.node(), "cpu", self._address),
            self._health,
            self._obey,
            spec.config.cluster.heartbeat_s,
        )

    def start(self) -> None:
        """Returns when it serves. Raises AddressUnusable if an earlier life holds the address for too long."""
        self._thread.call(self._serve(), _START_TIMEOUT_S + self._spec.config.cluster.bind_wait_s)
        self._link.start()

    async def _serve(self) -> None:
        scheduler = Scheduler(self._spec.config.scheduler, self._term, self._spec.facts.fingerprint)
        self._server = server = SchedulerServer(scheduler, self._spec.token)
        wait_s = self._spec.config.cluster.bind_wait_s
        await address.take(lambda: server.start(self._address), AddressUnusable, wait_s)
        self._state = HealthState.READY
        self._ending = asyncio.create_task(self._end_with(self._server))
        self._watching = asyncio.create_task(self._watch_controller())

    async def _end_with(self, server: SchedulerServer) -> None:
        try:
            log.error("term %d is superseded by term %d", self._term, await server.wait())
        except Exception:
            # The process's one net: a decider in doubt ends, and the next term starts from what its peers say.
            log.exception("term %d has failed", self._term)
        os._exit(1)

    def _health(self) -> Health:
        if hung := self._watch.look({"loop": self._thread.turns}, time.monotonic()):
            return Health(HealthState.FAILED, detail=hung)
        gauges = self._server.snapshot() if self._server is not None else {}
        return Health(self._state, gauges=gauges)

    async def _watch_controller(self) -> None:
        """It answers each heartbeat. One that has fallen silent is killed, so that Ray starts the next: nobody
        else looks at it."""
        life = self._spec.config.cluster
        watch = TurnWatch({"controller": life.companion_deadline_s})
        while True:
            await asyncio.sleep(life.heartbeat_s)
            hung = watch.look({"controller": self._heard}, time.monotonic())
            if hung and (controller := self._controller):
                log.error("%s: its process %d is killed", hung, controller.pid)
                self._controller = None
                if controller.is_running():  # itself, not another that has its number by now
                    end_process(controller.pid)

    def _obey(self, order: OrderBody) -> None:
        loop = self._thread.loop
        match order:
            case Members(attention, pid, node, draining):
                self._heard += 1
                if node == platform.node() and (self._controller is None or self._controller.pid != pid):
                    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended since
                        self._controller = psutil.Process(pid)
                said = MembersExpected(_incarnations(attention), _incarnations(draining))
                if self._server is not None:
                    loop.call_soon_threadsafe(self._server.post, said)
            case Exit(reason):
                log.info("the scheduler stops: %s", reason)
                loop.call_soon_threadsafe(lambda: loop.create_task(self._stop()))
            case _:
                log.warning("the scheduler was ordered %s, which is not for it", type(order).__name__)

    async def _stop(self) -> None:
        """The process stays, idle, until it is ended from outside: ending itself, it would be restarted."""
        self._ending.cancel()
        self._watching.cancel()
        if self._server is not None:
            await self._server.stop()
        await asyncio.to_thread(self._link.close, _STOP_TIMEOUT_S)


def _incarnations(members: Iterable[Member]) -> frozenset[Incarnation]:
    return frozenset(Incarnation(member.id, member.incarnation) for member in members)

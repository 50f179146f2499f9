"""A worker's process without Ray: its service joined to the controller.

Orders go to the service, its events and health to the controller. Each role imports its own service only, so
an expert worker's process never holds attention code. When told to exit it stops the service, closes the link
and ends the process, for nobody may need it any more.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from cluster.events import Exit, OrderBody, Prepare, Publish, Register, Retire, Role, SendTrace
from cluster.member_link import MemberLink
from cluster.spec import ClusterSpec
from cluster.watch import TurnWatch
from model import device
from router.membership import Adopted, Failed, Health, HealthState, MemberEvent, Prepared, Traced
from router.placement import EpochId, Member

log = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0
_COLLECT_S = 3.0
"""How long a stopped process waits for Ray to end it; then it ends itself."""

Handlers = dict[type[Any], Callable[[Any], None]]


class Service(Protocol):
    """What both pools' services have in common."""

    def start(self) -> None: ...

    def health(self) -> Health: ...

    def turns(self) -> Mapping[str, int]:
        """What grows while its threads turn, by their names: `compute`, `streams`."""

    def stop(self, grace_s: float) -> None: ...


class WorkerProcess:
    def __init__(self, spec: ClusterSpec, role: Role, member: Member, node_ip: str) -> None:
        """`node_ip`: where other hosts reach this one, if the cluster has any."""
        self._member = member
        self._epoch: EpochId | None = None  # last prepared or adopted
        self._told_to_exit = threading.Event()
        self.stopped: Future[str] = Future()
        """Done when the worker has stopped because it was told to: why."""
        self._reason = ""
        life = spec.config.cluster
        self._watch = TurnWatch({"compute": life.compute_stall_s, "streams": life.loop_stall_s})
        device_name = functools.cache(lambda: device.name(spec.config.device))
        build = _attention if role is Role.ATTENTION else _expert
        self._service, self._handlers, address = build(spec, member, self._happened, node_ip)
        self._link = MemberLink(
            spec.controller_address,
            spec.token,
            member,
            spec.facts.fingerprint,
            lambda: Register(role, os.getpid(), platform.node(), device_name(), address(), self._epoch),
            self._health,
            self._obey,
            life.heartbeat_s,
        )

    def start(self) -> None:
        """Returns at once; a service that cannot start says so through its health."""
        self._service.start()
        self._link.start()
        threading.Thread(target=self._end, name="worker-end", daemon=True).start()

    def _health(self) -> Health:
        """The service's own, or failed when a thread hangs that should turn. While it loads nothing need turn: the
        controller watches its progress."""
        health = self._service.health()
        if health.state not in (HealthState.READY, HealthState.DRAINING):
            return health
        hung = self._watch.look(self._service.turns(), time.monotonic())
        return replace(health, state=HealthState.FAILED, detail=hung) if hung else health

    def _happened(self, event: MemberEvent) -> None:
        """From the service's threads."""
        if isinstance(event, Failed):
            log.error("%s#%d: %s", self._member.id, self._member.incarnation, event.detail)
            self._link.report()  # its health says it
            return
        if isinstance(event, Prepared | Adopted):
            self._epoch = event.epoch
        self._link.report(event)

    def _obey(self, order: OrderBody) -> None:
        if isinstance(order, Exit):
            self._reason = order.reason
            self._told_to_exit.set()
        elif type(order) in self._handlers:
            self._handlers[type(order)](order)
        else:
            log.warning("%s was ordered %s, which is not for its role", self._member.id, type(order).__name__)

    def _end(self) -> None:
        self._told_to_exit.wait()
        log.info("%s#%d exits: %s", self._member.id, self._member.incarnation, self._reason)
        try:
            self._service.stop(_STOP_GRACE_S)
            self._link.close(_STOP_GRACE_S)
            self.stopped.set_result(self._reason)
            threading.Event().wait(_COLLECT_S)
        finally:
            os._exit(0)


def _attention(
    spec: ClusterSpec, member: Member, on_event: Callable[[MemberEvent], None], _node_ip: str
) -> tuple[Service, Handlers, Callable[[], str]]:
    from attention_workers.service import AttentionService

    config = spec.config
    service = AttentionService(
        config.model_path, member, spec.token, config.attention, config.router, config.transport,
        config.device, config.pools.gpus_per_worker, spec.scheduler_address, on_event,
    )  # fmt: skip

    def send_trace(order: SendTrace) -> None:
        on_event(Traced(order.number, service.trace(order.seconds, order.bytes_max)))

    handlers: Handlers = {Publish: lambda order: service.publish(order.placement), SendTrace: send_trace}
    return service, handlers, lambda: ""


def _expert(
    spec: ClusterSpec, member: Member, on_event: Callable[[MemberEvent], None], node_ip: str
) -> tuple[Service, Handlers, Callable[[], str]]:
    from expert_workers.service import ExpertService

    config = spec.config
    service = ExpertService(
        config.model_path, member, spec.token, config.expert, config.router, config.transport,
        spec.exchange_host(node_ip), config.device, config.pools.gpus_per_worker, on_event,
    )  # fmt: skip
    handlers: Handlers = {
        Prepare: lambda order: service.prepare(order.placement, order.unhurried),
        Retire: lambda order: service.retire(order.epoch),
    }
    return service, handlers, lambda: service.address

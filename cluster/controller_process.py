"""The controller's process without Ray: its server in a loop of its own. One life is one term."""

from __future__ import annotations

import os
import platform
from typing import Any

from cluster import address
from cluster.controller import Controller, ControllerConfig
from cluster.controller_server import ControllerServer, WorkerDriver
from cluster.epochs import ModelShape
from cluster.events import Pools
from cluster.loop_thread import LoopThread
from cluster.roster import Patience
from cluster.spec import ClusterSpec
from cluster.store import POOLS, Store, draw
from cluster.version import VERSION

_START_TIMEOUT_S = 10.0
_DRAIN_MARGIN_S = 5.0
"""What a gateway may take beyond the drain itself, to close its connections."""


class ControllerProcess:
    def __init__(self, spec: ClusterSpec, store: Store, driver: WorkerDriver) -> None:
        """Draws the next term from the store, and reads there which lives earlier terms have ordered, and which
        workers they wanted."""
        self._spec, self._driver = spec, driver
        self._term = draw(store, "controller")
        self._incarnations = store.lasts()
        remembered = store.read(POOLS)
        self._config = _controller_config(spec, Pools.from_json(remembered) if remembered else None)
        self._thread = LoopThread("controller")
        self._server: ControllerServer | None = None

    def start(self) -> None:
        """Returns when it serves. Raises OSError if an earlier life holds the address for too long."""
        self._thread.call(self._serve(), _START_TIMEOUT_S + self._spec.config.cluster.bind_wait_s)

    async def _serve(self) -> None:
        spec, life, facts = self._spec, self._spec.config.cluster, self._spec.facts
        shape = ModelShape(facts.fingerprint, facts.num_layers, facts.num_experts)
        now_s = self._thread.loop.time()
        controller = Controller(self._config, self._term, shape, self._incarnations, now_s)
        self._server = server = ControllerServer(
            controller, self._driver, spec.token, _about(spec), life.heartbeat_s / 2, self._thread.loop.time
        )
        await address.take(lambda: server.start(spec.controller_address), OSError, life.bind_wait_s)

    def drain(self) -> None:
        """Begin to end the cluster; the status document's phase says how far it is."""
        assert self._server is not None
        self._thread.call(self._server.drain(), _START_TIMEOUT_S)


def _controller_config(spec: ClusterSpec, remembered: Pools | None) -> ControllerConfig:
    sizes, life = spec.config.pools, spec.config.cluster
    return ControllerConfig(
        attention_workers=sizes.attention_workers,
        expert_workers=sizes.expert_workers,
        replicas=sizes.replicas,
        pools=remembered,
        balancer=spec.config.balancer,
        drain_timeout_s=life.drain_timeout_s + _DRAIN_MARGIN_S,
        companion_deadline_s=life.companion_deadline_s,
        pid=os.getpid(),
        node=platform.node(),
        patience=Patience(
            member_deadline_s=life.member_deadline_s,
            doubt_s=2 * life.heartbeat_s,
            startup_timeout_s=life.startup_timeout_s,
            restarts_max=life.restarts_max,
            backoff_s_min=life.restart_backoff_s_min,
            backoff_s_max=life.restart_backoff_s_max,
        ),
    )


def _about(spec: ClusterSpec) -> dict[str, Any]:
    config = spec.config
    return {
        "version": VERSION,
        "cluster": config.cluster.name,
        "model": config.model_name,
        "model_path": str(config.model_path),
        "transport": config.transport,
        "numerics": config.attention.numerics,
        "controller": {"pid": os.getpid(), "node": platform.node(), "address": spec.controller_address},
    }

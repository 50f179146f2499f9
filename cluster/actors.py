"""Thin Ray shells: each builds its process, starts it, and forwards the few calls that Ray makes.

What they host is in `cluster/*_process.py` and knows no Ray. Modules with tensors are imported by the workers
that need them only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray

from cluster import logs
from cluster.events import Role
from cluster.processes import import_behind
from cluster.ray_driver import RayWorkers, node_ip
from cluster.ray_store import RayStore
from cluster.spec import ClusterSpec
from cluster.store import draw
from router.placement import Member

log = logging.getLogger(__name__)


def _use_threads(count: int) -> None:
    """One compute thread per process unless told otherwise: idle OpenMP threads steal cores (DESIGN 11).

    Said before torch is imported, which reads it then. A Ray runtime environment would say it too, but has Ray
    start the interpreter twice for each process.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def _beginning(name: str) -> Iterator[None]:
    """The first life's failure goes to who launches the cluster. A later life's ends its process: Ray restarts a
    process that dies, but never again an actor whose constructor has raised."""
    try:
        yield
    except Exception:
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            raise
        log.exception("the %s could not begin again; its next life will try", name)
        os._exit(1)


class _Worker:
    def __init__(self, role: Role, spec: str, worker_id: str, incarnation: int) -> None:
        parsed = ClusterSpec.from_json(spec)
        config = parsed.config
        _use_threads(config.attention.threads if role is Role.ATTENTION else config.expert.threads)
        service = "attention_workers.service" if role is Role.ATTENTION else "expert_workers.service"
        import_behind(service, "cluster.worker_process")
        from cluster.worker_process import WorkerProcess

        logs.to_stderr(config.cluster.log_format)
        self._process = WorkerProcess(parsed, role, Member(worker_id, incarnation), node_ip())
        self._process.start()

    async def watch(self) -> str:
        """Returns when the worker has stopped, with the reason; fails when its process dies before."""
        return await asyncio.wrap_future(self._process.stopped)


@ray.remote
class AttentionActor(_Worker):
    def __init__(self, spec: str, worker_id: str, incarnation: int) -> None:
        super().__init__(Role.ATTENTION, spec, worker_id, incarnation)


@ray.remote
class ExpertActor(_Worker):
    def __init__(self, spec: str, worker_id: str, incarnation: int) -> None:
        super().__init__(Role.EXPERT, spec, worker_id, incarnation)


@ray.remote
class ControllerActor:
    def __init__(self, spec: str) -> None:
        _use_threads(1)
        from cluster.controller_process import ControllerProcess

        parsed = ClusterSpec.from_json(spec)
        logs.to_stderr(parsed.config.cluster.log_format)
        with _beginning("controller"):
            store = RayStore(parsed.cluster_id)
            workers = RayWorkers(parsed, store, {Role.ATTENTION: AttentionActor, Role.EXPERT: ExpertActor})
            self._process = ControllerProcess(parsed, store, workers)
            self._process.start()

    def ready(self) -> None:
        """Answered once it serves."""

    def drain(self) -> None:
        self._process.drain()


@ray.remote
class SchedulerActor:
    def __init__(self, spec: str) -> None:
        _use_threads(1)
        from cluster.scheduler_process import SchedulerProcess

        parsed = ClusterSpec.from_json(spec)
        logs.to_stderr(parsed.config.cluster.log_format)
        with _beginning("scheduler"):
            self._process = SchedulerProcess(parsed, draw(RayStore(parsed.cluster_id), "scheduler"))
            self._process.start()

    def ready(self) -> None:
        """Answered once it serves."""


class GatewayReplica:
    """Serve owns its life, and tries again whenever one that has served cannot be replaced; bytes take its own
    HTTP server."""

    def __init__(self, spec: str, index: int) -> None:
        _use_threads(1)
        from cluster.gateway_process import GatewayProcess

        parsed, name = ClusterSpec.from_json(spec), f"gateway-{index}"
        logs.to_stderr(parsed.config.cluster.log_format)
        incarnation = draw(RayStore(parsed.cluster_id), name)
        own = replace(parsed, config=parsed.config.of_gateway(index))
        self._process = GatewayProcess(own, Member(name, incarnation), node_ip())
        self._process.start()

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not self._process.is_alive:
            raise RuntimeError("the gateway's loop has ended")

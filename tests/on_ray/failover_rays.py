"""Rays whose nodes and head can be lost: what `failover_soak` does to them, and what it looks at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.on_ray.failover_story import Seen, lose_worker, until_whole

OBJECT_STORE_BYTES = 80 << 20
FROZEN_S = 30.0
CALM_S = 10.0  # looked at once more, when all is over


class OneRay:
    """A Ray of as many nodes that `serve` joins, and whose head keeps its state on disk."""

    def __init__(self, num_nodes: int) -> None:
        from ray.cluster_utils import Cluster  # only now: Ray reads its authentication when it is imported

        self._cluster = Cluster()
        self._nodes = [self._add() for _ in range(num_nodes)]
        self._cluster.wait_for_nodes()

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)

    @property
    def flags(self) -> list[str]:
        return ["--ray-address", self._cluster.address]

    def _pid(self, node: Any, kind: str) -> int:
        [process] = node.all_processes[kind]
        return int(process.process.pid)

    def on_last_node(self) -> list[psutil.Process]:
        """Its raylet and all that runs under it."""
        raylet = psutil.Process(self._pid(self._nodes[-1], "raylet"))
        return [raylet, *raylet.children(recursive=True)]

    @property
    def head_pid(self) -> int:
        return self._pid(self._nodes[0], "gcs_server")

    def restart_head(self) -> None:
        self._nodes[0].kill_gcs_server()
        self._nodes[0].start_gcs_server()

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def ray_of(num_nodes: int) -> Iterator[OneRay]:
    with tempfile.TemporaryDirectory(prefix="gcs-", dir="/tmp") as state, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", state)
        patch.setenv("RAY_worker_niceness", "0")
        one = OneRay(num_nodes)
        try:
            yield one
        finally:
            one.shutdown()


@contextlib.asynccontextmanager
async def _seen(seen: Seen, what: dict[str, Any]) -> AsyncIterator[None]:
    since_s, before = time.monotonic(), seen.answers
    yield
    what["gap_s"], what["answers"] = seen.worst(since_s).seconds, seen.answers - before
    what["took_s"] = time.monotonic() - since_s


async def lose_node(client: httpx.AsyncClient, seen: Seen, ray: OneRay, _chance: random.Random) -> dict[str, Any]:
    """The second node and all its workers at once; they are started again on the first."""
    before = await until_whole(client)
    family = ray.on_last_node()
    pids = {process.pid for process in family}
    lost = [worker["id"] for worker in before["workers"] if worker["pid"] in pids]
    what: dict[str, Any] = {"who": "node", "workers": lost}
    async with _seen(seen, what):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.sleep(1.0)
        await until_whole(client)
        await asyncio.sleep(CALM_S)
    what["whole_s"] = what["took_s"] - CALM_S
    return what


async def freeze_head(client: httpx.AsyncClient, seen: Seen, ray: OneRay, chance: random.Random) -> dict[str, Any]:
    """For FROZEN_S, in which a worker is killed, too: its successor comes once the head is back."""
    status = await until_whole(client)
    worker = chance.choice([one for one in status["workers"] if one["role"] == "expert"])
    what: dict[str, Any] = {"who": f"head frozen for {FROZEN_S:g} s", "and": worker["id"]}
    async with _seen(seen, what):
        os.kill(ray.head_pid, signal.SIGSTOP)
        async with asyncio.TaskGroup() as tasks:
            losing = tasks.create_task(lose_worker(client, seen, worker, signal.SIGKILL))
            try:
                await asyncio.sleep(FROZEN_S)
            finally:
                os.kill(ray.head_pid, signal.SIGCONT)
        what["whole_s"] = losing.result().whole_s
        await asyncio.sleep(CALM_S)
    return what


async def restart_head(
    client: httpx.AsyncClient, seen: Seen, ray: OneRay, chance: random.Random
) -> dict[str, Any]:
    """With its state kept; then a worker is killed, which needs it."""
    before = await until_whole(client)
    what: dict[str, Any] = {"who": "head restarted"}
    async with _seen(seen, what):
        await asyncio.to_thread(ray.restart_head)
        await asyncio.sleep(CALM_S)
        after = await until_whole(client)
        lives = [[(one["id"], one["pid"]) for one in status["workers"]] for status in (before, after)]
        what["same_workers"] = lives[0] == lives[1]
        worker = chance.choice([one for one in after["workers"] if one["role"] == "expert"])
        what["and"] = worker["id"]
        what["whole_s"] = (await lose_worker(client, seen, worker, signal.SIGKILL)).whole_s
        await asyncio.sleep(CALM_S)
    return what

"""Clients that stream all the while, and pools that grow and shrink under them: what they saw, and what is left.

Each client asks for the same seeded answer again and again, so that each answer can be compared with one that
nothing disturbed.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.on_ray.served import Served, ours_left

STUCK_S = 120.0  # without a token: then a stream is stuck
SCALED_WITHIN_S = 240.0


@dataclass
class Seen:
    """By all clients."""

    answers: int = 0
    different: list[int] = field(default_factory=list)  # clients
    longest_gap_s: float = 0.0  # between two events of one stream


async def stream(client: httpx.AsyncClient, i: int, max_tokens: int, seen: Seen) -> list[int]:
    ids: list[int] = []
    asked = {
        "prompt": [5 + i, 7, 9], "max_tokens": max_tokens, "seed": i, "temperature": 1.0, "ignore_eos": True,
        "return_token_ids": True, "stream": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        heard_s = None
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now_s = time.monotonic()
            seen.longest_gap_s = max(seen.longest_gap_s, now_s - (heard_s or now_s))
            heard_s = now_s
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            ids += event["choices"][0].get("token_ids") or []
    seen.answers += 1
    return ids


async def undisturbed_and_with(
    cluster: Served, sizes: list[tuple[int, int]], num_clients: int, max_tokens: int
) -> tuple[Seen, Seen]:
    """What clients see alone, and while the pools take these sizes (attention, experts) one after another."""
    calm, scaled, is_over = Seen(), Seen(), asyncio.Event()
    limits = httpx.Limits(max_connections=num_clients + 2)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=STUCK_S, limits=limits) as client:
        alone = await asyncio.gather(*(stream(client, i, max_tokens, calm) for i in range(num_clients)))

        async def ask(i: int) -> None:
            while not is_over.is_set():
                if await stream(client, i, max_tokens, scaled) != alone[i]:
                    scaled.different.append(i)

        async with asyncio.TaskGroup() as clients:
            for i in range(num_clients):
                clients.create_task(ask(i))
            for attention, experts in sizes:
                await scale(client, attention, experts)
            is_over.set()
    return calm, scaled


async def scale(client: httpx.AsyncClient, attention: int, experts: int) -> None:
    """And wait until the pools are so, nobody is left to leave, and every attention worker has sequences."""
    answer = await client.post("/v1/admin/scale", json={"attention": attention, "experts": experts})
    assert answer.status_code == 200, answer.text
    wanted = {
        "attention": {"wanted": attention, "ready": attention, "leaving": 0},
        "expert": {"wanted": experts, "ready": experts, "leaving": 0},
    }
    assert {role: pool["wanted"] for role, pool in answer.json()["pools"].items()} == {
        "attention": attention, "expert": experts,
    }  # fmt: skip
    async with asyncio.timeout(SCALED_WITHIN_S):
        while (status := await status_of(client))["pools"] != wanted or not _is_shared(status):
            assert not status["scaling_failed"], status["scaling_failed"]
            await asyncio.sleep(0.1)


async def status_of(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/v1/admin/status")).raise_for_status().json()


def _is_shared(status: dict[str, Any]) -> bool:
    """As heartbeats say; the latest is at most a second old."""
    return all(w["gauges"].get("sequences", 0) > 0 for w in status["workers"] if w["role"] == "attention")


def left(cluster: Served) -> dict[str, Any]:
    """What the cluster's processes hold of the machine, in counts and bytes; those of Ray included."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    pids = {worker["pid"] for worker in cluster.status()["workers"]}
    workers = [process for process in family if process.pid in pids]
    return {
        "processes": len(family),
        "worker_descriptors": sum(process.num_fds() for process in workers),
        "worker_segments": sum(_num_segments(process.pid) for process in workers),
        "worker_bytes": sum(process.memory_info().rss for process in workers),
        "bytes": sum(process.memory_info().rss for process in family),
        "sockets": len(ours_left(cluster.cluster_id())),
    }


def _num_segments(pid: int) -> int:
    """Mappings of anonymous shared memory."""
    with open(f"/proc/{pid}/maps") as maps:
        return sum("/memfd:" in line for line in maps)

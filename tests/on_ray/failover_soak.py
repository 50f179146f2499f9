"""Workers and deciders killed and frozen under 24 streams, one after the other: `make soak`.

Each story has a cluster of its own and prints a line for each loss, then one in all. Ends with 1 where a request
failed or a token or logprob differs; gaps are told beside what clients see undisturbed on the same machine. Alone:

    python -m tests.on_ray.failover_soak --losses 12 kill
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from model.synthetic import make_checkpoint
from tests.on_ray.failover_rays import freeze_head, lose_node, ray_of, restart_head
from tests.on_ray.failover_story import Clients, Seen, lose_worker, status_of, until_whole
from tests.on_ray.served import Served, soaking

NUM_CLIENTS = 24
MAX_TOKENS = 120
CALM_ROUNDS = 2
PAUSE_S = 5.0
POOLS = ("--attention-workers", "2", "--expert-workers", "3")

Story = Callable[[httpx.AsyncClient, Seen, random.Random, int], Awaitable[None]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=12, help="of each story")
    parser.add_argument("--seed", type=int, default=0)
    names = [*STORIES, *OF_RAY]
    parser.add_argument("stories", nargs="*", choices=[*names, []], help=f"of {', '.join(names)}; none: all")
    arguments = parser.parse_args()
    with soaking() as folder:
        make_checkpoint("demo", folder / "demo", seed=0)
        codes = [run(name, folder, arguments) for name in arguments.stories or names]
    return max(codes)


def run(name: str, folder: Path, arguments: argparse.Namespace) -> int:
    """The exit code of one story."""
    chance, log = random.Random(arguments.seed), folder / f"{name}.log"
    if name in OF_RAY:
        with ray_of(2) as ray, Served(folder / "demo", *POOLS, "--replicas", "2", *ray.flags, log=log) as cluster:

            async def story(client: httpx.AsyncClient, seen: Seen, chance: random.Random, _losses: int) -> None:
                await asyncio.sleep(PAUSE_S)
                tell(await OF_RAY[name](client, seen, ray, chance))

            return asyncio.run(told(name, cluster, story, chance, 1))
    flags, story = STORIES[name]
    with Served(folder / "demo", *POOLS, *flags, log=log) as cluster:
        return asyncio.run(told(name, cluster, story, chance, arguments.losses))


async def told(name: str, cluster: Served, story: Story, chance: random.Random, losses: int) -> int:
    urls = [cluster.url]
    if story is gateways:
        urls.append(f"http://127.0.0.1:{cluster.port + 1}")
    clients = Clients(urls, NUM_CLIENTS, MAX_TOKENS, may_reconnect=range(1, len(urls)))
    calm = await clients.calm(CALM_ROUNDS)
    undisturbed = {
        "p50_s": calm.percentile_s(0.5),
        "p99_s": calm.percentile_s(0.99),
        "worst_s": calm.worst().seconds,
    }
    tell({"story": name, "undisturbed": undisturbed})
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client, clients.streaming() as seen:
        await story(client, seen, chance, losses)
    tell({
        "story": name, "answers": seen.answers, "tokens": seen.tokens, "failed": seen.failed,
        "different": seen.different, "reconnected": len(seen.reconnected),
        "worst_minus_p99_s": seen.worst().seconds - undisturbed["p99_s"],
    })  # fmt: skip
    return 1 if seen.failed or seen.different or calm.failed or calm.different else 0


def tell(what: dict[str, object]) -> None:
    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items()}
        return round(value, 3) if isinstance(value, float) else value

    print(json.dumps(rounded(what)), flush=True)


async def _workers(
    client: httpx.AsyncClient, seen: Seen, chance: random.Random, losses: int, number: int, role: str = ""
) -> None:
    """One worker after another, of either kind or of one."""
    for _ in range(losses):
        await asyncio.sleep(PAUSE_S)
        status = await until_whole(client)
        worker = chance.choice([one for one in status["workers"] if role in one["role"]])
        tell(dataclasses.asdict(await lose_worker(client, seen, worker, number)))


async def kill(client: httpx.AsyncClient, seen: Seen, chance: random.Random, losses: int) -> None:
    await _workers(client, seen, chance, losses, signal.SIGKILL)


async def stop(client: httpx.AsyncClient, seen: Seen, chance: random.Random, losses: int) -> None:
    """Hung: found by a deadline, killed, so that it cannot act when it is resumed."""
    await _workers(client, seen, chance, losses, signal.SIGSTOP)


async def one_replica(client: httpx.AsyncClient, seen: Seen, chance: random.Random, losses: int) -> None:
    """Requests wait until its successor has loaded."""
    await _workers(client, seen, chance, losses, signal.SIGKILL, "expert")


async def deciders(client: httpx.AsyncClient, seen: Seen, _chance: random.Random, losses: int) -> None:
    """Scheduler and controller in turn: what runs goes on."""
    for number in range(losses):
        await asyncio.sleep(PAUSE_S)
        before = await until_whole(client)
        name = ("scheduler", "controller")[number % 2]
        since_s = time.monotonic()
        os.kill(before[name]["pid"], signal.SIGKILL)
        while (after := await status_of(client)) is None or (after[name] or before[name])["pid"] == before[name][
            "pid"
        ]:
            await asyncio.sleep(0.1)
        whole = await until_whole(client)
        whole_s = time.monotonic() - since_s
        lives = [[(w["id"], w["pid"]) for w in status["workers"]] for status in (before, whole)]
        assert lives[0] == lives[1], "a worker was replaced as well"
        await asyncio.sleep(1.0)
        tell({"who": name, "gap_s": seen.worst(since_s, since_s + whole_s).seconds, "whole_s": whole_s})


async def gateways(client: httpx.AsyncClient, seen: Seen, _chance: random.Random, losses: int) -> None:
    """The second of two, again and again: its clients, of odd numbers, come again; nobody else notices."""
    for _ in range(losses):
        await asyncio.sleep(PAUSE_S)
        before = await until_whole(client)
        [second] = [gateway for gateway in before["gateways"] if gateway["id"] == "gateway-1"]
        num_before, since_s = len(seen.reconnected), time.monotonic()
        os.kill(second["pid"], signal.SIGKILL)
        while not _has_successor(second, await status_of(client) or before):
            await asyncio.sleep(0.1)
        again_s = time.monotonic() - since_s
        await asyncio.sleep(2.0)
        others = [
            gap
            for gap in seen.gaps
            if gap.client % 2 == 0 and not gap.is_first and gap.began_s + gap.seconds > since_s
        ]
        tell({
            "who": "gateway-1", "again_after_s": again_s, "reconnected": len(seen.reconnected) - num_before,
            "gap_of_others_s": max(gap.seconds for gap in others),
        })  # fmt: skip


def _has_successor(gateway: dict[str, Any], status: dict[str, Any]) -> bool:
    return any(
        one["id"] == gateway["id"] and one["incarnation"] > gateway["incarnation"] and one["state"] == "ready"
        for one in status["gateways"]
    )


STORIES: dict[str, tuple[tuple[str, ...], Story]] = {
    "kill": (("--replicas", "2"), kill),
    "stop": (("--replicas", "2"), stop),
    "one_replica": (("--replicas", "1"), one_replica),
    "deciders": (("--replicas", "2"), deciders),
    "gateways": (("--replicas", "2", "--gateways", "2"), gateways),
}

OF_RAY = {"node": lose_node, "head_frozen": freeze_head, "head_restarted": restart_head}


if __name__ == "__main__":
    sys.exit(main())

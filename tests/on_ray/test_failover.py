"""Workers of either kind killed under streams of every kind: nothing fails, no token and no logprob changes.

The longer form, with what else can be lost, is `tests.on_ray.failover_soak`.
"""

import asyncio
import signal

import httpx
import pytest

from model.synthetic import make_checkpoint
from tests.on_ray.failover_story import Clients, lose_worker, until_whole
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

NUM_CLIENTS = 24
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def cluster(shared_ray, tmp_path_factory):
    path = tmp_path_factory.mktemp("failover")
    make_checkpoint("demo", path / "demo", seed=0)
    flags = ["--attention-workers", "2", "--expert-workers", "3", "--replicas", "2"]
    with Served(path / "demo", *flags, *shared_ray, log=path / "log") as served:
        yield served


def test_kill_9_of_either_kind_of_worker_fails_nothing_and_changes_no_token(cluster):
    """Seeds, logprobs, stop strings, siblings, penalties, a schema and chat, each over and over."""

    async def story():
        clients = Clients([cluster.url], NUM_CLIENTS, MAX_TOKENS)
        calm = await clients.calm(rounds=1)
        assert not calm.failed
        assert not calm.different
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client, clients.streaming() as seen:
            for worker_id in ("expert-1", "attention-0"):
                status = await until_whole(client)
                [worker] = [one for one in status["workers"] if one["id"] == worker_id]
                print(await lose_worker(client, seen, worker, signal.SIGKILL))
        print(f"{seen.answers} answers; undisturbed p99 {calm.percentile_s(0.99):.3f} s")
        assert not seen.failed
        assert not seen.different
        assert seen.answers >= NUM_CLIENTS

    asyncio.run(story())

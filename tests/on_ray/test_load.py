"""Many clients at once on the demo model: nothing lost, nothing mixed up, nothing left; a frozen scheduler; and
workers of either kind killed under streams of every kind.

A longer form of the latter, with what else can be lost, is `tests.on_ray.failover_soak`.
"""

import asyncio
import json
import os
import signal
import time

import httpx
import pytest

from cluster.cli import main
from model.synthetic import make_checkpoint
from tests.on_ray.failover_story import Clients, lose_worker, until_whole
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

FROZEN_S = 10.0
NUM_CLIENTS = 24
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def cluster(shared_ray, tmp_path_factory):
    path = tmp_path_factory.mktemp("load")
    make_checkpoint("demo", path / "demo", seed=0)
    (path / "config.yaml").write_text("scheduler: {first_token_s: 600}\n")  # a slow machine refuses nobody
    flags = ["--attention-workers", "2", "--expert-workers", "3", "--replicas", "2"]
    with Served(path / "demo", *flags, *shared_ray, "--config", path / "config.yaml", log=path / "log") as served:
        yield served


def body(i, max_tokens):
    prompt = [20 + (7 * i + j) % 900 for j in range(3 + i % 40)]
    return {
        "prompt": prompt, "max_tokens": max_tokens, "seed": i, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


async def stream(client, i, max_tokens, arrivals=None):
    """The token ids of one stream, and its finish reason."""
    ids, reason = [], None
    asked = body(i, max_tokens) | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if arrivals is not None:
                arrivals.append(time.monotonic())
            ids += event["choices"][0].get("token_ids") or []
            reason = event["choices"][0]["finish_reason"] or reason
    return ids, reason


def clients(cluster):
    return httpx.AsyncClient(base_url=cluster.url, timeout=120, limits=httpx.Limits(max_connections=200))


def assert_idle(cluster):
    """Every KV block free or cached, nothing running, queued or open."""

    def is_idle(status):
        workers = [w["gauges"] for w in status["workers"] if w["role"] == "attention"]
        scheduler, [gateway] = status["scheduler"]["gauges"], status["gateways"]
        return (
            all(w["kv_blocks_free"] + w["kv_blocks_cached"] == w["kv_blocks_total"] for w in workers)
            and sum(w["sequences"] for w in workers) == scheduler["running"] == scheduler["waiting"] == 0
            and gateway["gauges"]["sequences_open"] == 0
        )

    cluster.wait_for_status(is_idle)


def test_64_streams_complete_and_none_is_mixed_up(cluster):
    """Each stream brings what the same request brings alone."""

    async def story():
        async with clients(cluster) as client:
            together = await asyncio.gather(*(stream(client, i, 24 + i % 9) for i in range(64)))
            for i in range(0, 64, 7):
                assert await stream(client, i, 24 + i % 9) == together[i]
            return together

    answers = asyncio.run(story())
    assert [(len(ids), reason) for ids, reason in answers] == [(24 + i % 9, "length") for i in range(64)]
    assert len({tuple(ids) for ids, _ in answers}) == 64
    assert_idle(cluster)


def test_streams_go_on_while_the_scheduler_is_frozen(cluster):
    """Plans are standing orders: SIGSTOP for ten seconds stops no stream, and none fails afterwards."""
    before = cluster.status()
    pid = before["scheduler"]["pid"]

    async def story():
        arrivals = []
        async with clients(cluster) as client:
            running = [asyncio.create_task(stream(client, i, 400, arrivals)) for i in range(16)]
            while len(arrivals) < 64:
                await asyncio.sleep(0.05)
            os.kill(pid, signal.SIGSTOP)
            frozen_at = time.monotonic()
            try:
                await asyncio.sleep(FROZEN_S)
            finally:
                os.kill(pid, signal.SIGCONT)
            return await asyncio.gather(*running), arrivals, frozen_at

    answers, arrivals, frozen_at = asyncio.run(story())
    assert [(len(ids), reason) for ids, reason in answers] == [(400, "length")] * 16
    halfway = frozen_at + FROZEN_S / 2
    if max(arrivals) > frozen_at + FROZEN_S:  # all may have ended before
        assert sum(halfway < at < frozen_at + FROZEN_S for at in arrivals) > 50
    assert sum(frozen_at < at < frozen_at + FROZEN_S for at in arrivals) > 100
    assert_idle(cluster)


def test_a_client_that_hangs_up_leaves_no_work_behind(cluster):
    """Streaming and unary: the sequence ends, and its blocks are free."""

    async def story():
        async with clients(cluster) as client:
            for _ in range(4):
                async with client.stream(
                    "POST", "/v1/completions", json=body(1, 4000) | {"stream": True}
                ) as answer:
                    async for _ in answer.aiter_lines():
                        break
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body(2, 4000), timeout=httpx.Timeout(120, read=0.5))

    asyncio.run(story())
    assert_idle(cluster)


def test_the_benchmark_of_promises_runs_all_its_parts(cluster, tmp_path, capsys):
    """Its figures are of real answers: so many rounds, every request served or refused, a prefix that is found."""
    later_ms = (0, 1500, 1600, 1700)  # when the first has long been computed
    rows = [{"timestamp": at, "input_length": 1600, "output_length": 40, "hash_ids": [0, 1, 2 + n, 9]}
            for n, at in enumerate(later_ms)]  # fmt: skip
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    few = "--rounds 1 --decoders 2 --long-tokens 400 --prefix-tokens 600 --load-prompt 8 --load-answer 4 --step 1"
    parts = "--parts interruption,prefix,overload,trace --seconds 2 --trace-seconds 2 --trace-requests 4 --json"
    assert (
        main(["bench", "serving", "--url", cluster.url, "--trace", str(trace), *few.split(), *parts.split()]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["interruption"]["ratio"]["count"] == 1
    assert found["prefix"]["ratio"]["p50"] > 0
    overload = found["overload"]
    assert not overload["failures"]
    assert overload["num_admitted"] + overload["num_refused"] == overload["num_offered"] > 0
    assert found["trace"]["ideal_share"] == pytest.approx(3 * 64 / 400)
    assert 0 < found["trace"]["cached_share"] <= found["trace"]["ideal_share"]
    assert_idle(cluster)


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

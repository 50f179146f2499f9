"""Processes killed or frozen under streams: nothing fails, no token changes, and nothing is stuck."""

import asyncio
import json
import os
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest

from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

NUM_STREAMS = 6
MAX_TOKENS = 300
STUCK_S = 120.0  # without a token, a loss included: then a stream is stuck


@pytest.fixture(scope="module")
def cluster(tiny, tmp_path_factory):
    """One holder per expert and room for more; `experts_wait_s` far below what a holder's successor takes to
    start. Any gain is worth a rebalancing, which takes a moment at so few bytes a second."""
    folder = tmp_path_factory.mktemp("losses")
    config = folder / "config.yaml"
    config.write_text(
        "attention: {experts_wait_s: 0.2}\n"
        "cluster: {bind_wait_s: 0.3, companion_deadline_s: 5}\n"
        "balancer: {spare_slots: 2, slack: 0, gain_min: 0.001}\n"
        "expert: {load_bytes_per_s: 1000000}\n"
    )
    with Served(tiny, "--config", str(config), log=folder / "log") as served:
        yield served


async def stream(client, i, arrived=None):
    """The token ids of one stream; fails when it is stuck, or brings an error."""
    ids = []
    asked = {
        "prompt": [5 + i, 7, 9], "max_tokens": MAX_TOKENS, "seed": i, "temperature": 1.0, "ignore_eos": True,
        "return_token_ids": True, "stream": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                ids += event["choices"][0].get("token_ids") or []
                if arrived is not None:
                    arrived.set()
    return ids


async def undisturbed_and_with(cluster, disturb):
    """What all streams bring alone, and what they bring when `disturb()` is called in their midst."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=STUCK_S) as client:
        alone = await asyncio.gather(*(stream(client, i) for i in range(NUM_STREAMS)))
        arrived = [asyncio.Event() for _ in range(NUM_STREAMS)]
        running = [asyncio.create_task(stream(client, i, arrived[i])) for i in range(NUM_STREAMS)]
        await asyncio.gather(*(event.wait() for event in arrived))
        assert not any(task.done() for task in running)
        disturb()
        return alone, await asyncio.gather(*running)


def worker(cluster, role):
    return next(w for w in cluster.status()["workers"] if w["role"] == role)


def wait_until_whole(cluster):
    cluster.wait_for_status(lambda status: status["phase"] == "ready", within_s=120)


def wait_until_logged(cluster, text, within_s=120.0):
    """By some process of the cluster."""
    deadline = time.monotonic() + within_s
    while True:
        logs = (cluster.folder() / "session_latest" / "logs").glob("**/*.*")
        if any(text in log.read_text(errors="replace") for log in logs if log.is_file()):
            return
        assert time.monotonic() < deadline, f"{text!r} was not logged within {within_s} s"
        threading.Event().wait(0.2)


def test_rebalancing_under_load_changes_no_token_and_a_dry_run_changes_nothing(cluster):
    """Experts move and are copied between workers while six streams use them."""

    def ask(dry_run):
        answer = cluster.client.post("/v1/admin/rebalance", params={"dry_run": dry_run})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def slots(status):
        return [worker["slots"] for worker in status["workers"] if worker["role"] == "expert"]

    cluster.complete([3, 4, 5], max_tokens=200, ignore_eos=True)
    before = cluster.wait_for_status(lambda status: status["balance"]["imbalance"] is not None)
    would = ask(dry_run=True)
    assert would["epoch"] is None
    assert would["moves"]
    assert would["imbalance_after"] < would["imbalance_before"]
    assert cluster.status()["epoch"] == before["epoch"]
    done = []
    alone, disturbed = asyncio.run(undisturbed_and_with(cluster, lambda: done.append(ask(dry_run=False))))
    assert disturbed == alone
    after = cluster.wait_for_status(lambda status: status["epoch"] == done[0]["epoch"])
    assert done[0]["epoch"]["number"] == before["epoch"]["number"] + 1
    copies = sum(move["from"] is None for move in done[0]["moves"])
    assert sum(slots(after)) == sum(slots(before)) + copies - done[0]["dropped"]
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


def test_losing_the_only_holder_of_experts_fails_no_request(cluster):
    """The bounded wait ends long before its successor has loaded: the sequences queue again, unchanged."""
    pid = worker(cluster, "expert")["pid"]
    alone, disturbed = asyncio.run(undisturbed_and_with(cluster, lambda: os.kill(pid, signal.SIGKILL)))
    assert disturbed == alone
    wait_until_whole(cluster)
    assert worker(cluster, "attention")["detail"] == ""
    preempted = cluster.client.get("/metrics").text
    assert 'reason="preempted"' in preempted


def test_a_scheduler_that_finds_its_address_taken_is_started_again_until_it_is_free(cluster):
    """A constructor that raised would end it for good: its process dies instead, and Ray starts the next."""
    before = cluster.status()["scheduler"]
    process = psutil.Process(before["pid"])
    process.kill()
    process.wait()
    with socket.socket(socket.AF_UNIX) as earlier_life:
        earlier_life.bind("\0" + before["address"].removeprefix("unix-abstract:"))
        wait_until_logged(cluster, "scheduler could not begin again")
    status = cluster.wait_for_status(
        lambda status: status["phase"] == "ready" and status["scheduler"]["incarnation"] > before["incarnation"],
        60,
    )
    assert status["scheduler"]["incarnation"] >= before["incarnation"] + 2
    cluster.complete([3, 4, 5], max_tokens=4)


@pytest.mark.parametrize("nth", range(2))
def test_a_frozen_attention_worker_is_replaced_and_its_streams_go_on(cluster, nth):
    """SIGSTOP: nobody hears the socket close. It is found silent, killed, and its streams resumed elsewhere."""
    before = worker(cluster, "attention")
    alone, disturbed = asyncio.run(undisturbed_and_with(cluster, lambda: os.kill(before["pid"], signal.SIGSTOP)))
    assert disturbed == alone
    wait_until_whole(cluster)
    assert worker(cluster, "attention")["incarnation"] == before["incarnation"] + 1
    assert not psutil.pid_exists(before["pid"])


def test_an_attention_worker_frozen_for_a_moment_goes_on_itself(cluster):
    """SIGSTOP and SIGCONT within its deadline: nobody is lost, nobody judges what it was away from."""
    before = cluster.status()

    def freeze():
        pid = worker(cluster, "attention")["pid"]
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(2.0, os.kill, (pid, signal.SIGCONT)).start()

    alone, disturbed = asyncio.run(undisturbed_and_with(cluster, freeze))
    assert disturbed == alone
    wait_until_whole(cluster)
    lives = [[(w["id"], w["incarnation"]) for w in status["workers"]] for status in (before, cluster.status())]
    assert lives[0] == lives[1]


def test_a_frozen_controller_is_killed_by_the_scheduler_and_the_next_term_begins(cluster):
    """They watch each other: nobody else would find a controller that only hangs."""
    before = cluster.status()
    os.kill(before["controller"]["pid"], signal.SIGSTOP)
    with httpx.Client(base_url=cluster.url, timeout=STUCK_S) as client:
        while (answer := client.get("/v1/admin/status")).status_code == 503:
            continue  # each answer takes as long as the gateway tries
    assert answer.json()["term"] == before["term"] + 1
    wait_until_whole(cluster)
    assert [w["pid"] for w in cluster.status()["workers"]] == [w["pid"] for w in before["workers"]]


def test_a_gateway_that_finds_its_port_taken_is_started_again_until_it_is_free(cluster):
    """Serve goes on replacing what has served before."""
    [before] = cluster.status()["gateways"]
    process = psutil.Process(before["pid"])
    process.kill()
    process.wait()
    with socket.create_server(("127.0.0.1", cluster.port)):
        wait_until_logged(cluster, "the port is in use")
    cluster.wait_until_ready()
    wait_until_whole(cluster)
    assert cluster.status()["gateways"][0]["incarnation"] >= before["incarnation"] + 2
    cluster.complete([3, 4, 5], max_tokens=4)


def test_kill_9_of_serve_leaves_no_process_and_no_folder(cluster):
    """Last of this cluster: Ray's own helpers would outlive it by a minute, its folder for ever."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    assert len(family) >= 8
    folder = cluster.folder()
    assert folder.is_dir()
    cluster.process.kill()
    _, alive = psutil.wait_procs(family, 45)
    assert not alive
    while folder.exists():  # the test's own time limit bounds it
        pass
